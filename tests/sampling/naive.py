"""The sampler's algorithm as plainly as it can be written: one request, the whole canvas, loops over positions.

Low-confidence, margin and random remasking; the even schedule, threshold and factor; temperature, guidance, and a canvas
that grows. The oracle of what is written for many requests at once.
"""

import torch

from llada_core.diffusion import hashed, keyed
from llada_core.modeling.predictor import MaskPredictor
from llada_core.sampling.params import SamplingParams
from llada_core.sampling.proposals import noise_key


@torch.no_grad()
def naive(model: MaskPredictor, prompt: list[int], params: SamplingParams, copy: int) -> list[int]:
    """The whole sequence; `copy` is the number of the answer among those to equal prompts."""
    mask, new = model.special_tokens.mask_id, params.max_new_tokens
    tokens, drawn = prompt + [mask] * new, 0
    key = noise_key(torch.tensor(prompt), params.seed or 0, copy)

    def uniforms(number: int, width: int) -> list[float]:
        bits = hashed(keyed(torch.tensor([key]), torch.tensor([number])), width)[0].tolist()
        return [((each >> 11) & (2**53 - 1)) * 2.0**-53 for each in bits]

    for first in range(len(prompt), len(tokens), params.block_length):
        places = range(first, min(first + params.block_length, len(tokens)))
        block_steps, step = params.steps // params.blocks, 0
        while opened := [at for at in places if tokens[at] == mask]:
            there = tokens[: places.stop] if params.variable_length else tokens
            logits = guided(model, there, len(prompt), params.cfg_scale)
            found = {}
            for rank, at in enumerate(opened):
                possible = logits[at].double()
                possible[mask] = -torch.inf
                if params.temperature:
                    u = torch.tensor(uniforms(drawn + rank, len(possible)), dtype=torch.float64)
                    possible = possible + params.temperature * -(-u.log()).log()
                token, share = int(possible.argmax()), logits[at].double().softmax(-1)
                sure = float(share[token])
                if params.remasking == "margin":
                    sure = float(share.topk(2).values @ torch.tensor([1.0, -1.0], dtype=torch.float64))
                found[at] = token, sure
            drawn += len(opened) * (params.temperature > 0)
            if params.remasking == "random":
                found = {at: (found[at][0], uniforms(drawn + rank, 1)[0]) for rank, at in enumerate(opened)}
                drawn += len(opened)
            order = sorted(opened, key=lambda at: (-found[at][1], at))
            quota = len(places) // block_steps + (step < len(places) % block_steps)
            for rank, at in enumerate(order):
                if params.threshold is not None:
                    write = rank == 0 or found[at][1] >= params.threshold
                elif params.factor is not None:
                    write = rank == 0 or found[at][1] >= 1 - params.factor / (rank + 2)
                else:
                    write = rank < quota
                if write:
                    tokens[at] = found[at][0]
            step += 1
    return tokens


def guided(model: MaskPredictor, tokens: list[int], prompt: int, scale: float) -> torch.Tensor:
    """(L, V) float32 logits of the whole canvas."""
    seeing = model(torch.tensor([tokens])).logits[0].float()
    if not scale:
        return seeing
    blind = [model.special_tokens.mask_id] * prompt + tokens[prompt:]
    unseeing = model(torch.tensor([blind])).logits[0].float()
    return unseeing + (scale + 1) * (seeing - unseeing)
