"""Any training stage by its name, for those without a program of their own: `python -m tasks STAGE [block.key=value ...]`."""

import sys

from llada_core.settings import ConfigError, nearest
from tasks.errors import one_line_errors
from tasks.launch.program import stage_program
from tasks.stages import TRAINING_STAGES
from tasks.work.training import train_stage

if __name__ == "__main__":
    with one_line_errors():
        name, *arguments = sys.argv[1:] or [""]
        if name not in TRAINING_STAGES:
            raise ConfigError(f"no training stage {name!r}{nearest(name, list(TRAINING_STAGES))}")
    stage_program(name, train_stage, arguments)
