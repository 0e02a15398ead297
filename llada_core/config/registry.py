"""What is registered, and when a candidate becomes champion. Does not know MLflow, folders or benchmarks."""

from pydantic import Field

from llada_core.sampling.params import SamplingParams
from llada_core.settings import Bits, Block


class GateParams(Block):
    """A candidate becomes champion if it is better on `better` by more than noise, and worse on none of `not_worse`.

    A name is a benchmark of `reports/eval`. Scores are compared question by question, with a paired 95 % interval.
    `at_least` are floors that hold for the first champion too. With none of the three only a first champion passes.
    """

    better: tuple[str, ...] = ()  # over the questions of all of these; empty: one that is not worse
    not_worse: tuple[str, ...] = ()
    at_least: dict[str, float] = Field(default_factory=dict)


class RegisterParams(Block):
    """The model that a run registers."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: str = "grpo"  # a training stage
    gate: GateParams = GateParams()
    device: str = "auto"  # where a served version lies: auto, cuda, cuda:N, mps, cpu
    bits: Bits | None = None  # of its weights; None: as stored
    sampling: SamplingParams = SamplingParams(max_new_tokens=64, block_length=64, steps=64, stop_at_eos=True)  # serving
