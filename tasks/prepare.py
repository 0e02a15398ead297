"""The stage `prepare`, as DVC calls it."""

from tasks.launch.program import stage_program
from tasks.work.prepare import run

if __name__ == "__main__":
    stage_program("prepare", run)
