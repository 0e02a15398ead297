"""The stage `report`, as DVC calls it."""

from tasks.launch.program import stage_program
from tasks.work.report import run

if __name__ == "__main__":
    stage_program("report", run)
