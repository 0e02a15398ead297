"""The stage `grpo`: reinforcement learning from verified answers."""

from tasks.launch.program import stage_program
from tasks.work.training import train_stage

if __name__ == "__main__":
    stage_program("grpo", train_stage)
