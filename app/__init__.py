"""The page: talk to a registered model in a browser and watch it write."""
