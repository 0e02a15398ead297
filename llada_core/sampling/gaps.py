"""Text with gaps as a canvas: `[[5]]` is five masked positions, `3:word` pins a word in an answer.

Knows encoders as functions from text to ids; does not know models or pages.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

from llada_core.sampling.params import SamplingParams
from llada_core.sampling.trace import typed

Encode = Callable[[str], list[int]]
GAP = re.compile(r"\[\[\s*(\d*)\s*\]\]")
PIN = re.compile(r"\s*(\d+)\s*:\s*([^,]+?)\s*(?:,|$)")
DEFAULT_GAP = 8


def with_gaps(text: str, encode: Encode, mask_id: int, longest: int) -> list[int]:
    """The ids of `text` with each `[[n]]` as n masks (`[[ ]]`: 8); raises ValueError without a gap or with too many."""
    pieces = GAP.split(typed(text))
    if len(pieces) == 1:
        raise ValueError("Mark where the model shall write: [[5]] is a gap of five tokens, for example 2+[[1]]=5.")
    ids: list[int] = []
    for literal, size in zip(pieces[::2], [*pieces[1::2], None], strict=True):
        ids += encode(literal) if literal else []
        if size is not None:
            ids += [mask_id] * min(int(size or DEFAULT_GAP), longest + 1)
    if len(ids) > longest:
        raise ValueError(
            f"Text and gaps have {len(ids)} tokens; at most {longest} fit. Make a gap or the text shorter."
        )
    if mask_id not in ids:
        raise ValueError("Every gap has length 0; write [[5]] for five tokens.")
    return ids


def for_template(params: SamplingParams, rows: Sequence[Sequence[int]], mask_id: int) -> SamplingParams:
    """The settings for templates: one block over the longest, at most as many steps as the most masks of a row."""
    masks = max(list(row).count(mask_id) for row in rows)
    return dataclasses.replace(
        params,
        max_new_tokens=masks,
        block_length=max(map(len, rows)),
        steps=min(params.steps, masks),
        stop_at_eos=False,
    )


def pinned(length: int, pins: str, encode: Encode) -> dict[int, int]:
    """Answer position -> token of words pinned as `0:Once, 12:end`; raises ValueError when one does not fit."""
    found: dict[int, int] = {}
    at = 0
    while at < len(pins):
        match = PIN.match(pins, at)
        if not match:
            raise ValueError(
                f"Write pins as position:word with commas between them, as 0:Once, 12:end (got {pins[at : at + 40]!r})."
            )
        position, ids = int(match[1]), encode(typed(match[2]))
        if position + len(ids) > length:
            raise ValueError(f"The pin {match[2]!r} ends at token {position + len(ids)}, the answer at {length}.")
        found |= dict(enumerate(ids, start=position))
        at = match.end()
    return found
