"""How a job is started and followed: launchers, workspaces, plans."""
