"""Runs killed with SIGKILL at random moments, in the middle of a save included, and gone on with until they end.

`python -m tests.training.kills FOLDER --count 100` prints one line per objective; the tests call `survive`. A child is
forked per attempt and kills itself at the n-th backward pass, fsync or rename, which leaves on disk what a kill from
outside would.
"""

import argparse
import json
import os
import random
import signal
import sys
from pathlib import Path

import torch

import llada_core.training.checkpoint as checkpoint_module
from llada_core.modeling import load_model
from llada_core.training.grpo import GRPO
from llada_core.training.params import GRPOParams, PreferenceParams, PretrainParams, SFTParams
from llada_core.training.progress import read_metrics
from llada_core.training.train import RunPaths, train
from tests.tiny import tiny_pair
from tests.training.data import write_data
from tests.training.test_grpo import SAMPLING, by_weights, write_prompts
from tests.training.test_preference import write_pairs

SAVE_EVERY = 4
COMMON = {"max_steps": 14, "learning_rate": 3e-3, "log_every": 1, "save_every": SAVE_EVERY, "samples": 0}
STAGES = {
    "pretrain": lambda: PretrainParams(**COMMON, batch_size=8),
    "sft": lambda: SFTParams(**COMMON, batch_size=8, optimiser="muon"),
    "grpo": lambda: GRPOParams(
        **COMMON, prompts=2, generations=3, iterations=3, sampling=SAMPLING, beta=0.04, sync_every=5, validate_every=2,
        reward="tests.training.test_grpo.likes_low_ids",
    ),
    "preference": lambda: PreferenceParams(**COMMON, batch_size=4, mask_samples=2),
}  # fmt: skip


def attempt(stage: str, data: Path, folder: Path, moment: tuple[str, int] | None) -> int:
    """Train in a forked child that kills itself at `moment`; its exit status (0: the run ended)."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # a fork has no threads: work shared with its parent's pool would wait for ever
            GRPO.validate = by_weights
            die_at(moment)
            model, tokenizer = tiny_pair()
            train(STAGES[stage](), model, tokenizer, RunPaths(data, folder, folder / "model"), seed=1)
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def die_at(moment: tuple[str, int] | None) -> None:
    """Make the n-th call of what `moment` names the last thing this process does."""
    if moment is None:
        return
    name, left = moment
    home = {"backward": torch.Tensor, "fsync": checkpoint_module.os, "replace": checkpoint_module.os}[name]
    real = getattr(home, name)

    def counted(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(home, name, counted)


def survive(stage: str, data: Path, folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill a run `kills` times, let it end, and compare it with an undisturbed one bit for bit.

    Raises AssertionError when anything differs or more than one checkpoint interval was computed again.
    """
    draw = random.Random(f"{stage} {seed}")
    assert attempt(stage, data, folder / "whole", None) == 0
    done = {"kills": 0, "finished_runs": 0, "steps_again": 0}
    while done["kills"] < kills:
        run = folder / f"killed-{done['finished_runs']}"
        name = draw.choice(["backward", "fsync", "fsync", "replace"])
        status = attempt(stage, data, run, (name, draw.randint(1, {"backward": 8, "fsync": 8, "replace": 2}[name])))
        if os.WIFSIGNALED(status):
            done["kills"] += 1
        else:
            assert status == 0, f"{stage}: exit status {status}"
            done["finished_runs"] += 1
            check(folder / "whole", run, done)
    run = folder / f"killed-{done['finished_runs']}"
    assert attempt(stage, data, run, None) == 0
    done["finished_runs"] += 1
    check(folder / "whole", run, done)
    return done


def check(whole: Path, run: Path, done: dict[str, int]) -> None:
    """The survivor's losses and weights are the whole run's."""
    wanted, found = (
        {line["step"]: line["loss"] for line in read_metrics(p / "metrics.jsonl") if "loss" in line} for p in (whole, run)
    )  # fmt: skip
    assert found == wanted, f"{run}: losses differ"
    mine, theirs = (load_model(p / "model").state_dict() for p in (run, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs), f"{run}: weights differ"
    highest, seen = 0, [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    for line in seen:
        if line.get("event") == "resumed":
            assert highest - line["step"] <= SAVE_EVERY, f"{run}: {highest - line['step']} steps computed again"
            done["steps_again"] += max(highest - line["step"], 0)
        highest = max(highest, line["step"])


def prepared(folder: Path) -> Path:
    """Data for every stage."""
    data = folder / "data"
    if not data.exists():
        write_pairs(write_prompts(write_data(data)))
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    data = prepared(asked.folder)
    for stage in STAGES:
        done = survive(stage, data, asked.folder / stage, -(-asked.count // len(STAGES)), asked.seed)
        print(f"{stage}: {json.dumps(done)}", file=sys.stdout, flush=True)


if __name__ == "__main__":
    main()
