"""The stage `sft`: supervised fine-tuning."""

from tasks.launch.program import stage_program
from tasks.work.training import train_stage

if __name__ == "__main__":
    stage_program("sft", train_stage)
