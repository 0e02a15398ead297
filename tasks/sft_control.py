"""The stage `sft_control`: fine-tuning continued for the compute that GRPO spent."""

from tasks.launch.program import stage_program
from tasks.work.training import train_stage

if __name__ == "__main__":
    stage_program("sft_control", train_stage)
