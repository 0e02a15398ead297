"""What a run is trained on: sources, generated puzzles, tokenizer and how text becomes rows, as frozen values."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from llada_core.settings import NOT_IN_FINGERPRINT, SettingsBlock


class SourceParams(SettingsBlock):
    """One source of rows.

    `name` is a short name (alpaca, dolly, gutenberg, gsm8k, tulu-3-sft-mixture, ultrachat, opc-sft-stage1, smoltalk,
    dclm, ...), a file or folder (absolute, or below the data root), or a data set of the Hub.
    """

    name: str = Field(min_length=1)
    config: str | None = None  # the Hub's name of a subset
    split: str | None = None  # None: the source's own training split
    revision: str | None = None  # Hub: commit, tag or branch
    limit: int | None = Field(default=None, ge=1)  # the first so many rows
    weight: float = Field(default=1.0, gt=0)  # how often each training row is used; 1.5: half of them twice
    map: str | None = (
        None  # ./my_maps.py:function, or a dotted path: from a row to what the stage needs; None: the source's own
    )
    text_field: str = "text"
    unit: Literal["file", "line"] = "file"  # plain text files: what one document is
    contains: dict[str, str] = Field(default_factory=dict)  # keep rows whose field contains this text
    streaming: bool = False  # Hub: read over the network without storing the source; needs `limit`
    train_on_test: bool = False  # insist on training on what is a test set, which is refused otherwise

    @model_validator(mode="after")
    def _streams_end(self) -> Self:
        if self.streaming and self.limit is None:
            raise ValueError(f"{self.name} is streamed: limit must say after how many rows to stop")
        return self


class PartParams(SettingsBlock):
    """What the data of all training stages share. `validation` is the share of rows held out, decided by content."""

    sources: tuple[SourceParams, ...] = ()
    validation: float = Field(default=0.02, ge=0, lt=1)


class PretrainData(PartParams):
    """Documents joined into rows of `length` tokens."""

    length: int = Field(default=128, ge=2)
    insert_eos: bool = True  # an EOS after each document
    drop_tail: bool = True  # the last, shorter row
    documents: bool = False  # write document numbers, which pretrain.document_mask needs


class SFTData(PartParams):
    """Dialogues in the chat template; the prompt is never masked.

    `turns` that train: last; all (in one row); each (one row per reply, with its history); sampled (one of these rows
    per dialogue, as LLaDA). `truncation` of rows beyond `length`: right cuts the end of the reply but never all of it;
    filter drops the row. Drops are counted in the card.
    """

    length: int = Field(default=128, ge=8)
    turns: Literal["last", "all", "each", "sampled"] = "last"
    truncation: Literal["right", "filter"] = "right"
    mask_prompt: bool = True  # False: the prompt is noised and trained on as well


class GRPOData(PartParams):
    """Prompts with what their verifier needs; prompts beyond `length` tokens are dropped and counted."""

    length: int = Field(default=256, ge=8)


class PreferenceData(PartParams):
    """Prompts with a chosen and a rejected reply, each pair cut to `length` tokens like `SFTData`."""

    length: int = Field(default=128, ge=8)
    truncation: Literal["right", "filter"] = "right"


class PuzzleCounts(SettingsBlock):
    """How many puzzles of one task; a puzzle's value decides on which side it may occur."""

    pretrain: int = Field(default=0, ge=0)
    sft: int = Field(default=0, ge=0)
    grpo: int = Field(default=0, ge=0)
    preference: int = Field(default=0, ge=0)
    validation: int = Field(default=0, ge=0)  # in each of the parts above that has any
    evaluate: int = Field(default=0, ge=0)


class SudokuParams(PuzzleCounts):
    """4x4 sudoku with an even chance of each number of empty cells from the first of `empty` to the last."""

    empty: tuple[int, int] = (5, 10)
    new_grids: int = Field(default=0, ge=0)  # evaluation puzzles all of whose solutions are never shown in training

    @model_validator(mode="after")
    def _range(self) -> Self:
        if not 1 <= self.empty[0] <= self.empty[1] <= 14:
            raise ValueError(f"empty {list(self.empty)}: give the least and the most empty cells, from 1 to 14")
        return self


class CountdownParams(PuzzleCounts):
    """Three numbers from 1 to `largest`, to reach a target from 1 to 99."""

    largest: int = Field(default=9, ge=3, le=100)


class SeatsParams(PuzzleCounts):
    """People to be seated anew so that nobody keeps a seat; in a share `hasty` of SFT's answers the last one does."""

    people: int = Field(default=8, ge=4, le=9)
    hasty: float = Field(default=0.0, ge=0.0, le=1.0)


class PuzzlesParams(SettingsBlock):
    """Generated puzzles, drawn from the run's seed.

    `dialogues` are the shares of dialogues with 1, 2, ... questions in fine-tuning and GRPO: a model that was only ever asked
    once answers a second question wrongly.
    """

    dialogues: tuple[float, ...] = (1.0,)
    sudoku: SudokuParams = SudokuParams()
    countdown: CountdownParams = CountdownParams()
    seats: SeatsParams = SeatsParams()

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if not math.isclose(sum(self.dialogues), 1.0, abs_tol=1e-6) or min(self.dialogues) < 0:
            shares = "give the shares of dialogues with 1, 2, ... questions, 1 in all"
            raise ValueError(f"dialogues {list(self.dialogues)}: {shares}")
        return self


class TokenizerParams(SettingsBlock):
    """Which tokenizer: that of a folder or Hub name, or (None) one trained on this run's own training text."""

    name: str | None = None
    vocab_size: int = Field(default=512, ge=270)  # of a trained one
    documents: int = Field(default=20_000, ge=1)  # texts of each source that it is trained on


class DataParams(SettingsBlock):
    """Everything `prepare` reads. `root` is where relative names are looked up; the environment variable
    LLADAFLOW_DATA_ROOT goes before it."""

    root: Annotated[str | None, NOT_IN_FINGERPRINT] = None
    workers: Annotated[int, NOT_IN_FINGERPRINT] = Field(default=0, ge=0)  # processes; 0: one per core
    # Rows of a source that cannot be used are left out and counted; more than this share of them (and than ten) are
    # refused, with `strict` any.
    max_unusable: Annotated[float, NOT_IN_FINGERPRINT] = Field(default=0.01, ge=0, le=1)
    strict: Annotated[bool, NOT_IN_FINGERPRINT] = False
    tokenizer: TokenizerParams = TokenizerParams()
    puzzles: PuzzlesParams = PuzzlesParams()
    pretrain: PretrainData | None = None
    sft: SFTData | None = None
    grpo: GRPOData | None = None
    preference: PreferenceData | None = None

    @model_validator(mode="after")
    def _every_part_has_rows(self) -> Self:
        tasks = (self.puzzles.sudoku, self.puzzles.countdown, self.puzzles.seats)
        for name in (n for n in PuzzleCounts.model_fields if n in type(self).model_fields):
            part, count = getattr(self, name), sum(getattr(task, name) for task in tasks)
            if part is not None and not part.sources and not count:
                raise ValueError(f"{name} has neither sources nor puzzles; name a source or set puzzles.sudoku.{name}")
            if part is None and count:
                raise ValueError(f"puzzles are counted for {name}, which has no block; add data.{name}")
        return self

    @property
    def parts(self) -> dict[str, PartParams]:
        """The blocks of the parts that this run has, by name."""
        blocks = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: block for name, block in blocks.items() if isinstance(block, PartParams)}
