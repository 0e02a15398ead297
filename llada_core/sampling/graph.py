"""A step of equal shapes as one compiled function, which a GPU captures as a CUDA graph and replays.

What a captured graph returns lies in memory that its next run writes over, and torch refuses to read it from then on. So
nothing of a step stays there: whoever calls gets copies, and what is fed to the next step never lies in that memory.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, _dynamo

from llada_core.modeling.predictor import MaskPredictor

Compiled = Literal["off", "graph", "max"]
SHAPES = 256  # that may be compiled, of rows, window and canvas
_MODES = {"graph": "reduce-overhead", "max": "max-autotune"}

Value = TypeVar("Value")
Result = TypeVar("Result")


def compiles(model: MaskPredictor) -> bool:
    """Whether torch can follow a step of this model without running it: grouped products of experts it takes in bf16 alone."""
    return model.expert_share == 1.0 or next(model.parameters()).dtype == torch.bfloat16


def compiled(step: Callable[..., Result], how: Compiled) -> Callable[..., Result]:
    """`step` as one function for each set of shapes that it is called with."""
    # Told by inputs as they are: shapes that were marked dynamic after a second call could not be captured.
    function: Callable[..., Result] = torch.compile(step, fullgraph=True, dynamic=False, mode=_MODES[how])

    def called(*arguments: Any) -> Result:
        with _dynamo.config.patch(recompile_limit=SHAPES):
            return function(*arguments)

    return called


def compiling_seconds() -> list[float]:
    """What each function took that this process has compiled so far."""
    return _dynamo.utils.compilation_time_metrics.get("_compile.compile_inner", [])


def keep_in_place(written: Iterable[Tensor]) -> None:
    """Says of tensors that a step writes into that they stay where they are: a graph that changes any other input is not
    captured. Where they have moved, as a cache that has grown has, the graph is captured anew, and not compiled anew.
    """
    for tensor in written:
        _dynamo.mark_static_address(tensor, guard=False)


def copied(value: Value, known: dict[int, Tensor]) -> Value:
    """The same value, with tensors of its own in dataclasses and dictionaries; all else is passed on.

    What was one tensor in two places is one again, for a compiled function is made for that too. `known`: copies so far,
    by the id of what they are copies of, and tensors that need none as their own.
    """
    found: Any = value
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = value.clone()
        found = known[id(value)]
    elif isinstance(value, dict):
        found = {name: copied(each, known) for name, each in value.items()}
    elif is_dataclass(value) and not isinstance(value, type):
        found = replace(value, **{each.name: copied(getattr(value, each.name), known) for each in fields(value)})
    return found
