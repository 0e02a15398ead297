"""How a model is to be asked: sampler settings, single or multi turn, system prompt, example questions."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from llada_core.files import document
from llada_core.modeling.families import recommended
from llada_core.sampling.params import PUBLISHED, RECOMMENDED, SamplingParams
from llada_core.settings import SettingsBlock

FILE = "usage.json"


class Usage(SettingsBlock):
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

    def doubts(self, params: SamplingParams, block_length: int | None) -> list[str]:
        """What is allowed and yet not what this model learnt, a line each; `block_length`: of the blocks by which it attends."""
        found = []
        if block_length is not None and params.block_length != block_length:
            found.append(f"block_length {params.block_length}: this model was trained with blocks of {block_length}")
        if block_length is None and params.sampler is not None:
            found.append(f"sampler {params.sampler} is for models that attend by blocks; this one sees all positions")
        elif params.sampler == "llada2.1" and self.sampling.sampler != params.sampler:
            found.append(
                "sampler llada2.1 edits what is written, which this model does not say it was taught (LLaDA2.1)"
            )
        return found

    def save(self, folder: Path) -> None:
        """Writes the file into a model folder."""
        (folder / FILE).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """What a model folder says; without the file, what its family recommends, or None.

        A rule of one's own is left out: weights that somebody publishes name no code to be run. Raises `ConfigError`
        where the file cannot be understood.
        """
        file = folder / FILE
        if not file.is_file():
            config = folder / "config.json"
            found = recommended(folder.name, document(config)) if config.is_file() else ""
            return cls(sampling=RECOMMENDED[found]) if found else None
        usage = cls.parse(document(file), str(file))
        return usage.model_copy(update={"sampling": replace(usage.sampling, rule=None)})
