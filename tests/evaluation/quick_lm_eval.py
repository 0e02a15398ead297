"""`python -m tasks.lm_eval` without lm-eval's index of 14,000 stock tasks, whose 20 s are not what is tested."""

import functools
import sys

import lm_eval.tasks

from tasks.errors import one_line_errors
from tasks.lm_eval import run

if __name__ == "__main__":
    lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    with one_line_errors():
        run(sys.argv[1:])
