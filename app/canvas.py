"""What happened on a canvas, as plain arrays and as texts; templates with gaps, and tokens that stay."""

import dataclasses
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from llada_core.modeling.attention import BlockCausal
from llada_core.modeling.predictor import MaskPredictor
from llada_core.sampling.canvas import Step
from llada_core.sampling.params import SamplingParams
from llada_core.tokenizer import Tokenizer

STATES = ("given", "open", "fresh", "done", "replaced")
GIVEN, OPEN, FRESH, DONE, REPLACED = range(5)  # a fresh one was masked before, a replaced one was another token
LEVELS = 5  # shades of confidence, on the page and in a terminal
LONGEST_TOKEN = 64  # characters; a page must survive a token of ten thousand
Decode = Callable[[int], str]
END = "∎"  # how an end token is shown: an answer has many, and their name says no more
UNWRITTEN = "_"  # a position of a stopped answer that nothing was written at, in its text
MARKS = {"\n": "⏎", "\r": "⏎", "\t": "⇥", " ": "␣"}


def counted(number: int, what: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number} {what}{'s' * (number != 1)}"


@dataclass(frozen=True)
class Frame:
    """One moment of a canvas. W positions; `state` indexes `STATES`.

    `tokens` (W,) int32, meaningless where open; `guesses` (W,) int32, what the model would write now where open, -1
    where it was not asked; `confidence` (W,) float32, of the written token when it was written or of the guess, nan if
    unknown; `block` [start, end) in these positions; `forwards` of the model so far; `step`, its number from 1.
    """

    tokens: NDArray[np.int32]
    guesses: NDArray[np.int32]
    confidence: NDArray[np.float32]
    state: NDArray[np.int8]
    block: tuple[int, int] = (0, 0)
    forwards: int = 0
    step: int = 0

    @property
    def written(self) -> int:
        """How many positions are no longer masked."""
        return int((self.state != OPEN).sum())

    @property
    def caption(self) -> str:
        """How far it is, as one line."""
        steps = f"step {self.step} · {counted(self.forwards, 'forward')}"
        return f"{steps} · {self.written} of {len(self.state)} positions"

    def in_block(self, at: int) -> bool:
        """Whether a position is in the present block."""
        return self.block[0] <= at < self.block[1]

    def level(self, at: int) -> int:
        """The shade 0..LEVELS-1 of a position's confidence; an unknown one is in the middle."""
        sure = float(self.confidence[at])
        return LEVELS // 2 if math.isnan(sure) else min(LEVELS - 1, int(max(0.0, sure) * LEVELS))

    def settled(self) -> "Frame":
        """The same canvas once the answer is finished: nothing in it is fresh, and no block is the present one."""
        state = np.where(np.isin(self.state, (FRESH, REPLACED)), DONE, self.state).astype(np.int8)
        return dataclasses.replace(self, state=state, block=(0, 0))


def unwritten(state: Sequence[int]) -> Frame:
    """A canvas before its first step, of which only the states are known."""
    nothing = np.full(len(state), -1, np.int32)
    return Frame(nothing, nothing, np.full(len(state), np.nan, np.float32), np.array(state, np.int8))


@dataclass
class Trace:
    """The frames of one generation, after its `prompt`: the last `width` columns, or (None) all that follow.

    `committed_at` (W,) holds the number of the step that wrote a position, 0 if given, -1 if open; `runners` the
    likeliest tokens of a position just before it was written, with their probabilities, once `find_runners_up` ran;
    `spellings` the text of every token that `spell` has met, so that a trace can be shown without its model; `blocks`, of
    a model that attends by blocks, their length.
    """

    prompt: list[int] = field(default_factory=list)
    width: int | None = None
    frames: list[Frame] = field(default_factory=list)
    committed_at: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    runners: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    spellings: dict[int, str] = field(default_factory=dict)
    blocks: int | None = None

    def add(self, step: Step, row: int = 0) -> Frame:
        """Records what `step` did to a row."""
        start = len(self.prompt) if self.width is None else step.tokens.shape[1] - self.width
        tokens, is_open, fresh, replaced, guesses, sure = (
            t[row, start:].cpu().numpy()
            for t in (step.tokens, step.open, step.committed, step.replaced, step.proposal, step.confidence)
        )
        sure = np.where(fresh & (tokens != guesses), np.nan, sure)  # the end of an answer fills what nobody proposed
        if not self.frames:
            self.committed_at = np.where(is_open | fresh, -1, 0).astype(np.int32)
        number = len(self.frames) + 1
        self.committed_at[is_open] = -1
        self.committed_at[fresh & ~is_open] = number
        known = [is_open, replaced, fresh, self.committed_at == 0]
        state = np.select(known, [OPEN, REPLACED, FRESH, GIVEN], DONE).astype(np.int8)
        kept = self.frames[-1].confidence if self.frames else np.full(len(tokens), np.nan, np.float32)
        confidence = np.where(is_open | fresh, sure, kept).astype(np.float32)
        first, last = (max(0, int(bound) - start) for bound in step.block[row])
        self.frames.append(
            Frame(
                tokens.astype(np.int32),
                guesses.astype(np.int32),
                confidence,
                state,
                (first, last),
                step.forwards,
                number,
            )
        )
        return self.frames[-1]

    def spell(self, decode: Decode) -> None:
        """Remembers the texts of the tokens of the newest frame, and of the runners-up."""
        seen = {token for frame in self.frames[-1:] for token in {*frame.tokens.tolist(), *frame.guesses.tolist()}}
        seen |= {token for others in self.runners.values() for token, _ in others}
        for token in seen - self.spellings.keys() - {-1}:
            self.spellings[token] = printable(decode(token))

    def texts(self, frame: Frame, *, guesses: bool = False) -> list[str]:
        """What stands at each position of a spelled frame; nothing where it is masked, unless `guesses` are asked for."""
        shown = np.where(frame.state != OPEN, frame.tokens, frame.guesses if guesses else -1)
        return ["" if token < 0 else self.spellings[token] for token in shown.tolist()]


def speller(tokenizer: Tokenizer) -> Decode:
    """One token as text; end tokens as `END`, other special ones by name."""
    return lambda token: END if token in tokenizer.end_ids else tokenizer.decode([token], skip_special=False)


@torch.inference_mode()
def find_runners_up(trace: Trace, model: MaskPredictor, decode: Decode, *, likeliest: int = 4, batch: int = 8) -> None:
    """Looks once more at every canvas of a trace, just before its step; fills `trace.runners` and spells them.

    Exactly what the sampler saw unless it was guided, shifted or cached; by blocks, also where what lies behind the answer
    in its last block had been written.
    """
    mask_id = model.special_tokens.mask_id
    how = {} if trace.blocks is None else {"block_causal": BlockCausal(trace.blocks)}
    blank = [np.where(f.state == GIVEN, f.tokens, mask_id) for f in trace.frames[:1]]
    seen = blank + [np.where(f.state == OPEN, mask_id, f.tokens) for f in trace.frames]  # before each step
    for first in range(1, len(trace.frames) + 1, batch):
        numbers = range(first, min(first + batch, len(trace.frames) + 1))
        rows = [trace.prompt + seen[n - 1].tolist() for n in numbers]
        rows = [row + [mask_id] * (-len(row) % (trace.blocks or 1)) for row in rows]
        places = []
        for row, frame in enumerate(trace.frames[first - 1 : numbers[-1]]):
            proposed = np.isin(frame.state, (FRESH, REPLACED)) & (frame.tokens == frame.guesses)
            places += [
                (row, at) for at in np.flatnonzero(proposed & (frame.tokens == trace.frames[-1].tokens)).tolist()
            ]
        if not places:
            continue
        width = len(rows[0])
        wanted = torch.tensor([row * width + len(trace.prompt) + at for row, at in places], device=model.device)
        ids = torch.tensor(rows, device=model.device)
        shares = model(ids, None, positions=wanted, **how).logits.float().softmax(-1)
        shares[:, mask_id] = -1.0  # it counts against the others, but is never written
        top = shares.topk(likeliest, dim=-1)
        for (_, at), ids, values in zip(places, top.indices.tolist(), top.values.tolist(), strict=True):
            trace.runners[at] = list(zip(ids, values, strict=True))
    trace.spell(decode)


_STEERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufff9\ufffa\ufffb")  # and it lasts


def printable(text: str, longest: int = LONGEST_TOKEN) -> str:
    """One token as visible characters: white space by signs, what would steer a terminal or a page by its number."""
    shown = MARKS.get(text) or ("␣" * len(text) if text.strip(" ") == "" else text.strip(" "))
    shown = "".join(
        MARKS.get(c, c) if c in "\n\r\t" else c if harmless(c) else f"‹{ord(c):04X}›" for c in shown[: longest + 1]
    )
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def typed(text: str) -> str:
    """A text as a person gave it, to be encoded: nothing is taken out; only lone halves of characters, which have no
    UTF-8, become U+FFFD (two halves that belong together become their character)."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def readable(text: str) -> str:
    """A whole text to be shown, with line breaks kept; what steers (bidi, escapes, half surrogates) becomes U+FFFD.

    For the eye alone: what a model reads is `typed`.
    """
    lined = text.replace("\r\n", "\n").replace("\r", "\n")
    return "".join(c if c in "\n\t" or harmless(c) else "\ufffd" for c in lined)


def harmless(character: str) -> bool:
    """Whether a character steers neither a terminal nor the direction of what stands around it, and can be encoded.

    Unassigned ones pass (the next emoji are unknown to this Python), as do signs for private use and format signs that
    belong to their neighbours: joiners, soft hyphens, Arabic number signs, the tags of flags, marks of direction.
    """
    if character in _STEERING:
        return False
    return unicodedata.category(character) not in {"Cc", "Cs", "Zl", "Zp"}


Encode = Callable[[str], list[int]]
GAP = re.compile(r"\[\[\s*+(\d*+)\s*+\]\]")  # without going back: a megabyte of blanks would take hours
PIN = re.compile(r"\s*(\d+)\s*:\s*([^,]+?)\s*(?:,|$)")
DEFAULT_GAP = 8


def parse_template(text: str, encode: Encode, mask_id: int, longest: int) -> list[int]:
    """The ids of `text` with each `[[n]]` as n masks (`[[ ]]`: 8); raises ValueError without a gap or with too many."""
    pieces = GAP.split(typed(text))
    if len(pieces) == 1:
        raise ValueError("Mark where the model shall write: [[5]] is a gap of five tokens, for example 2+[[1]]=5.")
    ids: list[int] = []
    for literal, size in zip(pieces[::2], [*pieces[1::2], None], strict=True):
        ids += encode(literal) if literal else []
        if size is not None:
            # Of a number only so many digits as Python reads at all.
            ids += [mask_id] * min(int(size[:18] or DEFAULT_GAP), longest + 1)
        if len(ids) > longest:  # at once: a hundred thousand gaps would be lists of gigabytes first
            raise ValueError(
                f"Text and gaps have {len(ids)} tokens or more; at most {longest} fit. Make a gap or the text shorter."
            )
    if mask_id not in ids:
        raise ValueError("Every gap has length 0; write [[5]] for five tokens.")
    return ids


def for_template(params: SamplingParams, rows: Sequence[Sequence[int]], mask_id: int) -> SamplingParams:
    """The settings for templates: room for the most masks of a row, in one block over the longest.

    A sampler of LLaDA2 keeps its blocks, and its model sees nothing behind the block that is being written.
    """
    masks = max(list(row).count(mask_id) for row in rows)
    made = params.at_length(masks).filling()
    return made if params.sampler else dataclasses.replace(made, block_length=max(map(len, rows)))


def fixed_tokens(length: int, pins: str, encode: Encode) -> dict[int, int]:
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
