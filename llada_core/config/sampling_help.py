"""What a page or a terminal says of the sampler's settings: a sentence each, presets, and what is exact about them.

Knows SamplingParams; does not know models.
"""

import dataclasses

from llada_core.config.sampling import SamplingParams

PRESETS = ("exact", "fast", "creative")
PUBLISHED = SamplingParams(max_new_tokens=128, block_length=32, steps=128, stop_at_eos=True)
"""Settings for a model that comes with none: those of LLaDA's own demo."""

SENTENCES: dict[str, str] = {
    "max_new_tokens": "How many tokens the answer has room for.",
    "block_length": "The answer is written block by block, each of so many tokens; as long as the answer: all at once.",
    "steps": "Looks at the canvas for the whole answer; as many as tokens is exact, fewer write several at once.",
    "temperature": "0 always takes the likeliest token; higher draws at random, for variety.",
    "remasking": "Which positions come first: the surest, those with the clearest lead, the least entropy, or any.",
    "cfg_scale": "Guidance away from the answer to no question; 0 is off, above 0 costs a second look per step.",
    "threshold": "Write every position at least this sure in one step (approximate, fast); 0.9 is usual.",
    "factor": "Like threshold, but stricter the more tokens are written at once; use one of the two.",
    "entropy_bound": "Like threshold, by the added entropies of what is written at once; needs remasking entropy.",
    "cache": "Keep keys and values of what is written: prefix (before the block) or dual (around it); approximate.",
    "cache_refresh": "Look at the whole canvas again every so many steps when a cache is used.",
    "cache_window": "Dual cache: positions on each side of the block that are always looked at again.",
    "stop_at_eos": "Stop as soon as the answer has ended instead of filling all of its room.",
    "forbid_tokens": "Token numbers that are never written.",
    "defer_tokens": "Token numbers that are written last.",
    "cfg_keep_tokens": "Token numbers of the question that guidance leaves visible.",
    "schedule": "How many tokens each step writes: even, or as a linear or cosine noise schedule expects.",
    "stochastic_transfer": "Draw the number of tokens per step from the noise schedule (linear or cosine).",
    "right_shift_logits": "For models converted from autoregressive ones, whose output is one position late.",
    "seed": "The same number gives the same answer; empty draws a new one each time.",
}


def preset(name: str, base: SamplingParams) -> SamplingParams:
    """`base` made exact (one token per step), fast (parallel, cached), or creative (drawn at random)."""
    exact = SamplingParams(
        max_new_tokens=base.max_new_tokens,
        block_length=min(base.block_length, base.max_new_tokens),
        steps=base.max_new_tokens,
        forbid_tokens=base.forbid_tokens,
        defer_tokens=base.defer_tokens,
        stop_at_eos=base.stop_at_eos,
        right_shift_logits=base.right_shift_logits,
        seed=base.seed,
    )
    if name == "exact":
        return exact
    if name == "fast":
        return dataclasses.replace(exact, threshold=0.9, cache="prefix")
    if name == "creative":
        return dataclasses.replace(exact, temperature=0.8)
    raise ValueError(f"There is no preset {name!r}; there are {', '.join(PRESETS)}.")


def exactness(made: SamplingParams) -> str:
    """Which of these settings approximate, as a sentence."""
    reasons = []
    if made.cache != "none":
        reasons.append(f"the {made.cache} cache reuses keys and values of an older canvas")
    if made.parallel:
        reasons.append("several tokens are written at once when the model is sure enough")
    elif made.steps < made.max_new_tokens:
        reasons.append(f"{made.max_new_tokens} tokens in {made.steps} steps write several at once")
    return (
        "Approximate: " + "; ".join(reasons) + "."
        if reasons
        else "Exact: one token per step, each from a full forward."
    )
