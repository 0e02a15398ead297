"""What happened on one canvas, step by step, as plain arrays: what a page, a terminal or a file shows.

Knows Steps and how to print a token safely; does not know HTML, terminals, models or text formats.
"""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from llada_core.modeling.predictor import MaskPredictor
from llada_core.sampling.canvas import Step
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
