"""A mask predictor that knows its answers by heart, and lm-eval's model that tells it each question's reference answer.

Everything else is real: rendering, tokenisation, canvas, sampler, detokenisation, stop strings, filters and metrics.
"""

from dataclasses import dataclass, field, replace

import torch
from jinja2 import Environment, StrictUndefined
from torch import nn

from llada_core.evaluation.answering import Responder, ResponderOptions
from llada_core.evaluation.harness import LladaLM
from llada_core.evaluation.params import BenchmarkSettings
from llada_core.evaluation.requests import pairs, wanted
from llada_core.modeling.predictor import MaskPredictor, Prediction

RENDER = Environment(undefined=StrictUndefined)


class Scripted(MaskPredictor):
    """Says script[prompt] after a prompt (ids), EOS where that ends; asked again, it says the next of several."""

    def __init__(self, tokenizer) -> None:
        super().__init__()
        self._special, self.size = tokenizer.special, tokenizer.vocab_size
        self.script: dict[tuple[int, ...], list[list[int]]] = {}
        self.anchor = nn.Parameter(torch.zeros(()))
        self.embedding = nn.Embedding(self.size, 1)
        self.calls = 0

    max_length = 1 << 20

    @property
    def vocab_rows(self):
        return self.size

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask=None, *, positions=None, **_):
        self.calls += 1
        said = torch.full_like(input_ids, self._special.eos_id)
        lengths = sorted({len(prompt) for prompt in self.script}, reverse=True)
        for row, tokens in enumerate(input_ids):
            columns = (
                torch.arange(len(tokens)) if attention_mask is None else attention_mask[row].bool().nonzero()[:, 0]
            )
            ids = tokens[columns].tolist()
            first = ids.index(self._special.mask_id) if self._special.mask_id in ids else len(ids)
            found = next((n for n in [first, *lengths] if tuple(ids[:n]) in self.script), None)
            if found is not None:
                answers = self.script[tuple(ids[:found])]
                answer = (answers.pop(0) if len(answers) > 1 else answers[0])[: len(ids) - found]
                said[row, columns[found : found + len(answer)]] = torch.tensor(answer, dtype=torch.long)
        flat = said.flatten() if positions is None else said.flatten()[positions]
        logits = nn.functional.one_hot(flat, self.size).float() * 9
        return Prediction(logits=logits if positions is not None else logits.view(*input_ids.shape, -1))


@dataclass(frozen=True)
class ByHeart(Responder):
    """Scores right continuations with 0, others with -1000; asked again (C-Eval does), it says the next of several."""

    right: dict = field(default_factory=dict)  # pair -> whether it is right, for each time it is asked

    def score(self, pairs):
        told = (self.right[(*map(tuple, p),)] for p in pairs)
        verdicts = (each.pop(0) if len(each) > 1 else each[0] for each in told)
        return [{"ll": 0.0 if right else -1000.0, "greedy": False} for right in verdicts]


class GoldLM(LladaLM):
    """Gives every question its reference answer, or that of the question `shift` places on."""

    def __init__(self, tokenizer, recipe, tasks, *, batch_size=32, shift=0, steps=1) -> None:
        model = Scripted(tokenizer)
        super().__init__(Responder(model, tokenizer, ResponderOptions(recipe.settings, batch_size)))
        self.recipe, self.tasks, self.shift, self.steps = recipe, tasks["tasks"], shift, steps

    def generate_until(self, requests, disable_tqdm=False):
        gold = RENDER.from_string(self.recipe.gold)
        replies = [gold.render(**r.doc) for r in requests]
        shifted = [replies[(i + self.shift) % len(replies)] for i in range(len(replies))]
        ids = list(self.tokenizer_.encode_batch(shifted))
        length = max(map(len, ids)) + 1
        sizes = {"max_new_tokens": length, "block_length": length, "steps": self.steps}
        over = BenchmarkSettings(
            sampling={**sizes, "eos": "none", "cache": "none"}
        )  # there is no network with keys to be kept
        options = replace(self.options, settings=over.over(self.recipe.settings))
        self.options, self.answerer = options, replace(self.answerer, options=options)
        asked = wanted([r.args for r in requests], options.settings, self.tokenizer_, self.answerer.longest)
        for each, answer in zip(asked, ids, strict=True):
            self.answerer.model.script.setdefault(each.prompt, []).append(answer)
        return super().generate_until(requests)

    def loglikelihood(self, requests, disable_tqdm=False):
        encoded = pairs([r.args for r in requests], self.tokenizer_, self.prefix_token_id)
        right = {}
        for pair, request in zip(encoded, requests, strict=True):
            right.setdefault((*map(tuple, pair),), []).append(self._is_gold(request))
        self.answerer = ByHeart(self.answerer.model, self.tokenizer_, self.options, right)
        return super().loglikelihood(requests)

    def _is_gold(self, request):
        task = self.tasks[request.task_name]
        if "mc2_targets" in request.doc:
            return request.doc["mc2_targets"]["labels"][request.idx] == 1
        gold = task.doc_to_text(request.doc) if task.multiple_input else task.doc_to_target(request.doc)
        if isinstance(gold, str):
            gold = task.doc_to_choice(request.doc).index(gold)
        return request.idx == gold
