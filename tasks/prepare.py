"""The stage `prepare`, as DVC calls it."""

from llada_core.settings import while_imported

with while_imported():
    from tasks.launch.program import stage_program
    from tasks.work.prepare import run

if __name__ == "__main__":
    stage_program("prepare", run)
