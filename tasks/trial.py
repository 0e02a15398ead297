"""The trial of a registered version, as its job calls it."""

from tasks.launch.program import stage_program
from tasks.launch.trial import STAGE, answer

if __name__ == "__main__":
    stage_program(STAGE, answer)
