"""The stage `evaluate`, as DVC calls it."""

from tasks.launch.program import stage_program
from tasks.work.evaluate import run

if __name__ == "__main__":
    stage_program("evaluate", run)
