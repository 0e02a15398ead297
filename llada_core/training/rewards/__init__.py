"""What a completion is worth to GRPO: a function (task, text, answer) -> float, found by name, in a file (`./my_reward.py:function`) or by dotted path.

`text` is what the model wrote up to its first end token.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from llada_core.settings import ConfigError, function_at, nearest
from llada_core.training.rewards import published
from llada_core.verifiers.answers import verify

Reward = Callable[[str, str, Mapping[str, Any]], float]


def correct(task: str, text: str, answer: Mapping[str, Any]) -> float:
    """1.0 for a right answer, else 0.0."""
    return float(verify(task, text, answer))


NAMED: dict[str, Reward] = {"default": correct, "correct": correct, "published": published.reward}


def reward_named(name: str, weights: Mapping[str, float] | None = None) -> Reward:
    """The reward called `name`, or the function at that dotted path; raises `ConfigError`.

    weights: those of the published reward's parts, for that reward alone.
    """
    for part in weights or ():
        if part not in published.PARTS:
            raise ConfigError(f"grpo.reward_weights: no reward {part!r}{nearest(part, list(published.PARTS))}")
    if weights and name == "published":
        return partial(published.reward, weights=weights)
    if name in NAMED:
        return NAMED[name]
    if "." not in name:
        ways = "or a function of your own, as ./my_reward.py:function"
        raise ConfigError(f"grpo.reward {name!r}{nearest(name, list(NAMED))}, {ways}")
    return function_at(name, "grpo.reward")
