"""What happened on a canvas as plain arrays; gaps to fill and tokens that stay; a canvas in a terminal."""

import dataclasses
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.text import Text

from llada_core.modeling.predictor import MaskPredictor
from llada_core.sampling.canvas import Step
from llada_core.sampling.params import SamplingParams
from llada_core.tokenizer import Tokenizer

State = Literal["given", "open", "fresh", "done"]
STATES: tuple[State, ...] = ("given", "open", "fresh", "done")
GIVEN, OPEN, FRESH, DONE = range(4)
LONGEST_TOKEN = 64  # characters; a page must survive a token of ten thousand
Decode = Callable[[int], str]
END = "∎"  # how an end token is shown: an answer has many, and their name says no more
MARKS = {"\n": "⏎", "\r": "⏎", "\t": "⇥", " ": "␣"}


@dataclass(frozen=True)
class Frame:
    """One moment of a canvas. W positions; `state` indexes `STATES`.

    `tokens` (W,) int32, meaningless where open; `guesses` (W,) int32, what the model would write now where open, -1
    where it was not asked; `confidence` (W,) float32, of the written token when it was written or of the guess, nan if
    unknown; `block` [start, end) in these positions; `forwards` of the model so far.
    """

    tokens: NDArray[np.int32]
    guesses: NDArray[np.int32]
    confidence: NDArray[np.float32]
    state: NDArray[np.int8]
    block: tuple[int, int]
    forwards: int

    @property
    def written(self) -> int:
        """How many positions are no longer masked."""
        return int((self.state != OPEN).sum())


@dataclass(frozen=True)
class Cell:
    """One position, ready to be printed: every text is printable and short."""

    text: str
    state: State
    confidence: float | None
    in_block: bool


@dataclass
class Trace:
    """The frames of one generation, after its `prompt`: the last `width` columns, or (None) all that follow.

    `committed_at` (W,) holds the number of the step that wrote a position, 0 if given, -1 if open; `runners` the
    likeliest tokens of a position just before it was written, with their probabilities, once `find_runners_up` ran.
    """

    prompt: list[int] = field(default_factory=list)
    width: int | None = None
    frames: list[Frame] = field(default_factory=list)
    committed_at: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    runners: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)

    def add(self, step: Step, row: int = 0) -> Frame:
        """Records what `step` did to a row."""
        start = len(self.prompt) if self.width is None else step.tokens.shape[1] - self.width
        tokens, is_open, fresh, guesses, sure = (
            t[row, start:].cpu().numpy()
            for t in (step.tokens, step.open, step.committed, step.proposal, step.confidence)
        )
        sure = np.where(fresh & (tokens != guesses), np.nan, sure)  # the end of an answer fills what nobody proposed
        if not self.frames:
            self.committed_at = np.where(is_open | fresh, -1, 0).astype(np.int32)
        self.committed_at[is_open] = -1
        self.committed_at[fresh & ~is_open] = len(self.frames) + 1
        state = np.select([is_open, fresh, self.committed_at == 0], [OPEN, FRESH, GIVEN], DONE).astype(np.int8)
        kept = self.frames[-1].confidence if self.frames else np.full(len(tokens), np.nan, np.float32)
        confidence = np.where(is_open | fresh, sure, kept).astype(np.float32)
        first, last = (max(0, int(bound) - start) for bound in step.block[row])
        self.frames.append(
            Frame(tokens.astype(np.int32), guesses.astype(np.int32), confidence, state, (first, last), step.forwards)
        )
        return self.frames[-1]

    def cells(self, frame: Frame, decode: Decode, *, guesses: bool = False, settled: bool = False) -> list[Cell]:
        """The positions of a frame as texts; masked ones are empty unless `guesses` are asked for.

        `settled`: the answer is finished, nothing in it is fresh and no block is the present one.
        """
        start, end = frame.block
        result = []
        for i, kind in enumerate(frame.state.tolist()):
            shown = frame.guesses[i] if kind == OPEN else frame.tokens[i]
            text = self.text(int(shown), decode) if kind != OPEN or guesses else ""
            sure = float(frame.confidence[i])
            state = STATES[DONE if settled and kind == FRESH else kind]
            result.append(Cell(text, state, None if sure != sure else sure, not settled and start <= i < end))
        return result

    def text(self, token: int, decode: Decode) -> str:
        """A token in print, remembered; nothing for -1."""
        if token < 0:
            return ""
        if token not in self.texts:
            self.texts[token] = printable(decode(token))
        return self.texts[token]

    def spell(self, decode: Decode) -> None:
        """Remembers the text of every token that occurs, so that the trace can be shown without its model."""
        seen = {int(t) for frame in self.frames for array in (frame.tokens, frame.guesses) for t in set(array.tolist())}
        for token in seen | {token for others in self.runners.values() for token, _ in others}:
            self.text(token, decode)


def speller(tokenizer: Tokenizer) -> Decode:
    """One token as text; end tokens as `END`, other special ones by name."""
    return lambda token: END if token in tokenizer.end_ids else tokenizer.decode([token], skip_special=False)


@torch.inference_mode()
def find_runners_up(trace: Trace, model: MaskPredictor, *, likeliest: int = 4, batch: int = 8) -> None:
    """Looks once more at every canvas of a trace, just before its step, and fills `trace.runners`.

    Exactly what the sampler saw unless it was guided, shifted or cached.
    """
    mask_id = model.special_tokens.mask_id
    blank = [np.where(f.state == GIVEN, f.tokens, mask_id) for f in trace.frames[:1]]
    seen = blank + [np.where(f.state == OPEN, mask_id, f.tokens) for f in trace.frames]  # before each step
    for first in range(1, len(trace.frames) + 1, batch):
        numbers = range(first, min(first + batch, len(trace.frames) + 1))
        rows = [trace.prompt + seen[n - 1].tolist() for n in numbers]
        places = []
        for row, frame in enumerate(trace.frames[first - 1 : numbers[-1]]):
            proposed = (frame.state == FRESH) & (frame.tokens == frame.guesses)
            places += [
                (row, at) for at in np.flatnonzero(proposed & (frame.tokens == trace.frames[-1].tokens)).tolist()
            ]
        if not places:
            continue
        width = len(rows[0])
        wanted = torch.tensor([row * width + len(trace.prompt) + at for row, at in places], device=model.device)
        shares = model(torch.tensor(rows, device=model.device), None, positions=wanted).logits.float().softmax(-1)
        shares[:, mask_id] = -1.0  # it counts against the others, but is never written
        top = shares.topk(likeliest, dim=-1)
        for (_, at), ids, values in zip(places, top.indices.tolist(), top.values.tolist(), strict=True):
            trace.runners[at] = list(zip(ids, values, strict=True))


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


BOX = 6  # columns of one position, a space included
SHADES = ("dim", "", "cyan", "bold cyan", "bold bright_white")  # unsure to sure
MASK, MASK_IN_BLOCK = "░" * (BOX - 1), "▒" * (BOX - 1)


def picture(cells: Sequence[Cell], width: int) -> Text:
    """The canvas in lines of `width` columns: masked hatched (closer in the present block), given underlined, fresh in reverse, others by confidence."""
    text, per_line = Text(), max(1, width // BOX)
    for number, cell in enumerate(cells):
        text.append(shown(cell), style_of(cell))
        text.append("\n" if number % per_line == per_line - 1 else " ")
    return text


def shown(cell: Cell) -> str:
    """The text of a position, cut or padded to its box."""
    if cell.state == "open" and not cell.text:
        return MASK_IN_BLOCK if cell.in_block else MASK
    return cell.text.ljust(BOX - 1) if len(cell.text) < BOX else cell.text[: BOX - 2] + "…"


def style_of(cell: Cell) -> str:
    """How a position looks; no meaning hangs on colour alone."""
    if cell.state == "open":
        return "italic yellow" if cell.text else ("bright_black" if cell.in_block else "dim bright_black")
    if cell.state == "given":
        return "underline"
    if cell.state == "fresh":
        return "reverse bold"
    sure = 0.5 if cell.confidence is None else cell.confidence
    return SHADES[min(len(SHADES) - 1, int(max(0.0, sure) * len(SHADES)))]
