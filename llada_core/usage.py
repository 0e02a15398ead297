"""How a model is to be asked: sampler settings, single or multi turn, system prompt, example questions."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from llada_core.files import document
from llada_core.sampling.params import PUBLISHED, SamplingParams
from llada_core.settings import Block

FILE = "usage.json"


class Usage(Block):
    """One value that is saved with a model and read by whoever asks it.

    The page, the terminal, `llada eval`, a version that MLflow serves, and the model card.
    """

    sampling: SamplingParams = Field(default=PUBLISHED, description="How an answer is sampled.")
    turns: Literal["single", "multi"] = Field(
        default="multi", description="Whether it learnt from dialogues of several questions; single: each stands alone."
    )
    system: str = Field(default="", description="What it is told before every conversation; empty: nothing.")
    examples: tuple[str, ...] = Field(default=(), description="Questions that it answers.")

    def messages(self, said: Sequence[dict[str, str]]) -> list[dict[str, str]]:
        """A conversation that ends with a question, as this model is to be shown it.

        A system prompt in it goes before the model's own; of a single-turn model, earlier turns are left out.
        """
        told = [message for message in said if message["role"] == "system"]
        turns = [message for message in said if message["role"] != "system"]
        if self.system and not told:
            told = [{"role": "system", "content": self.system}]
        return [*told, *(turns if self.turns == "multi" else turns[-1:])]

    def save(self, folder: Path) -> None:
        """Writes the file into a model folder."""
        (folder / FILE).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """What a model folder says; None for one without the file.

        A rule of one's own is left out: weights that somebody publishes name no code to be run. Raises `ConfigError`
        where the file cannot be understood.
        """
        file = folder / FILE
        if not file.is_file():
            return None
        usage = cls.parse(document(file), str(file))
        return usage.model_copy(update={"sampling": replace(usage.sampling, rule=None)})
