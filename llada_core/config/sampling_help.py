"""One sentence for every sampler setting, for a page or a terminal. Knows only the names in `SamplingParams`."""

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
