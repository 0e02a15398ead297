"""Generation by iterative unmasking: one loop over replaceable values."""

from llada_core.sampling.canvas import Step
from llada_core.sampling.params import SamplingParams
from llada_core.sampling.sampler import Generation, generate, infill, stream, stream_infill

__all__ = ["Generation", "SamplingParams", "Step", "generate", "infill", "stream", "stream_infill"]
