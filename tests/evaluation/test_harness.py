"""lm-eval's model on tiny networks: batches and kept answers change nothing, templates and flags are honoured."""

import logging
from dataclasses import replace

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from llada_core.evaluation.answering import AnswerStore, Responder, ResponderOptions, Shard
from llada_core.evaluation.harness import EstimatingLM, LladaLM
from llada_core.evaluation.params import BenchmarkSettings
from llada_core.likelihood import log_likelihood
from llada_core.modeling import load_model, save_model
from llada_core.sampling.sampler import generate
from llada_core.settings import ConfigError
from tests.tiny import tiny_pair

SETTINGS = BenchmarkSettings(
    sampling={"max_new_tokens": 12, "block_length": 4, "steps": 12, "stop_at_eos": True}, samples=4
)
PROMPTS = [
    "What is 7 + 5?",
    "Q",
    "Once upon a time there was a little girl who",
    "12, 34",
    "fox",
    "The lazy dog",
    "a b",
    "56",
]
HARNESS = "llada_core.evaluation"  # its logger
KINDS = ["llada", "llada_moe", "llada2", "bert"]


def lm_of(kind="llada", batch_size=8, store=None, settings=SETTINGS, **options):
    model, tokenizer = tiny_pair(kind)
    return LladaLM(Responder(model, tokenizer, ResponderOptions(settings, batch_size, **options)), store)


def generating(prompts=PROMPTS, **asked):
    return [Instance("generate_until", {}, (p, {"until": [], **asked}), i) for i, p in enumerate(prompts)]


def scoring(pairs):
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


PAIRS = [(p, " " + q) for p, q in zip(PROMPTS, [*PROMPTS[1:], "12."], strict=True)] + [("", "12")]


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_eight_answer_as_batches_of_one(kind):
    ones, eights = lm_of(kind, 1), lm_of(kind, 8)
    assert eights.generate_until(generating()) == ones.generate_until(generating())
    assert eights.new_tokens == ones.new_tokens
    single = [value for value, _ in ones.loglikelihood(scoring(PAIRS))]
    assert [value for value, _ in eights.loglikelihood(scoring(PAIRS))] == pytest.approx(single, abs=1e-4)


def test_a_model_that_attends_by_blocks_answers_infills_and_is_told_what_it_did_not_learn(caplog):
    """Four samples of each block that a continuation lies in are what it costs at most."""
    lm = lm_of(
        "llada2", settings=BenchmarkSettings(sampling={**SETTINGS.sampling, "sampler": "llada2.1", "threshold": 0.9})
    )
    lm.generate_until(generating())
    assert "block_length 4: this model was trained with blocks of 32" in caplog.text
    assert all(1 <= n <= 12 for n in lm.new_tokens if n)
    (filled,) = lm.generate_until([Instance("generate_until", {}, ("1 + [M]2[M] = 3", {"infill": "[M]"}), 0)])
    assert isinstance(filled, str)
    model, tokenizer = tiny_pair("llada2")
    cost = EstimatingLM(Responder(model, tokenizer, ResponderOptions(SETTINGS, 8)), rate=1.0)
    cost.loglikelihood(scoring([("a" * 30, "b" * 40)]))
    length = len(tokenizer.encode("a" * 30 + "b" * 40))
    assert cost.cost.forwards == 4 * (-(-length // 32))


def test_answers_are_those_of_the_sampler_and_the_estimator():
    lm = lm_of()
    model, tokenizer = lm.answerer.model, lm.tokenizer_
    params = replace_params(lm, PROMPTS[0])
    direct = generate(model, [tokenizer.encode(PROMPTS[0])], params).answers[0].tolist()
    assert lm.generate_until(generating(PROMPTS[:1])) == [tokenizer.answer_text(direct)]
    context, continuation = tokenizer.encode("The quick"), tokenizer.encode(" brown")
    expected = log_likelihood(model, context, continuation, samples=4)
    assert lm.loglikelihood(scoring([("The quick ", "brown")]))[0][0] == pytest.approx(expected, abs=1e-5)


def replace_params(lm, prompt):
    from llada_core.evaluation.requests import wanted

    return wanted([(prompt, {})], lm.options.settings, lm.tokenizer_, 128)[0].params


def test_stop_strings_cut_and_empty_generations_are_empty():
    lm = lm_of()
    (whole,) = lm.generate_until(generating(["fox"]))
    stop = whole[3]
    assert lm_of().generate_until(generating(["fox"], until=[stop])) == [whole.split(stop)[0]]
    assert lm_of().generate_until(generating(["fox"], until=whole[0])) == [""]


def test_a_blank_is_filled_between_what_surrounds_it():
    lm, seen = lm_of(), []
    original = lm.answerer.model.forward

    def forward(tokens, *args, **kwargs):
        seen.append(tokens.clone())
        return original(tokens, *args, **kwargs)

    lm.answerer.model.forward = forward
    texts = lm.generate_until(generating(["fox<>1234<> dog", "a<>12<> fox jumps"], infill="<>"))
    assert [len(lm.tokenizer_.encode(text)) for text in texts] == [4, 2] or "\ufffd" in "".join(texts)
    before, after, mask = lm.tokenizer_.encode("fox"), lm.tokenizer_.encode(" dog"), lm.tokenizer_.special.mask_id
    answered = next(tokens for tokens in seen if (tokens == mask).any())  # after the forwards that measured the rate
    longest = max(answered.tolist(), key=lambda row: row.count(mask))
    start = longest.index(mask)
    assert longest[start - len(before) : start] == before
    assert longest[start : start + 4] == [mask] * 4
    assert longest[start + 4 : start + 4 + len(after)] == after


def test_an_answer_that_never_stops_ends_at_its_length():
    settings = BenchmarkSettings(sampling={**SETTINGS.sampling, "eos": "forbid"})
    lm = lm_of(settings=settings)
    lm.generate_until(generating())
    assert lm.new_tokens == [12] * len(PROMPTS)
    assert min(lm.forwards) >= 12


@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_an_evaluation_that_was_killed_ends_as_an_undisturbed_one(tmp_path, monkeypatch, killed_after):
    undisturbed = lm_of(batch_size=3)
    expected = undisturbed.generate_until(generating())
    work, done = Responder.generate, []

    def dies(self, asked):
        if len(done) == killed_after:
            raise KeyboardInterrupt
        done.append(len(asked))
        return work(self, asked)

    with monkeypatch.context() as patched:
        patched.setattr(Responder, "generate", dies)
        with pytest.raises(KeyboardInterrupt):
            lm_of(batch_size=3, store=AnswerStore(tmp_path)).generate_until(generating())
    again = lm_of(batch_size=3, store=AnswerStore(tmp_path))
    assert again.generate_until(generating()) == expected
    assert (again.new_tokens, again.forwards) == (undisturbed.new_tokens, undisturbed.forwards)


def test_two_ranks_answer_as_one(tmp_path):
    expected = lm_of(batch_size=2).generate_until(generating())
    other = lm_of(batch_size=2, store=AnswerStore(tmp_path, Shard(1, 2))).generate_until(generating())
    assert 0 < sum(text == "" for text in other) < len(other)  # it did its share only
    assert lm_of(batch_size=2, store=AnswerStore(tmp_path, Shard(0, 2))).generate_until(generating()) == expected


def test_finished_answers_also_reach_lm_evals_own_cache():
    kept = []

    class Hook:
        def add_partial(self, kind, arguments, value):
            kept.append((kind, arguments[0], value))

    lm = lm_of()
    lm.set_cache_hook(Hook())
    texts = lm.generate_until(generating())
    assert sorted(kept) == sorted(("generate_until", p, t) for p, t in zip(PROMPTS, texts, strict=True))


def test_greedy_is_what_the_sampler_would_write():
    lm = lm_of(check_greedy=True)
    model, tokenizer = lm.answerer.model, lm.tokenizer_
    context = tokenizer.encode("fox")
    from llada_core.sampling.params import SamplingParams

    said = generate(model, [context], SamplingParams(max_new_tokens=3, block_length=3, steps=3)).answers[0].tolist()
    found = lm._loglikelihood_tokens([(("a", "b"), context, said), (("a", "c"), context, said[::-1])])
    assert [greedy for _, greedy in found] == [True, said == said[::-1]]


def test_rolling_likelihood_covers_each_token_once():
    lm = lm_of(max_length=16)
    text = "The quick brown fox jumps over the lazy dog."
    scored = []
    lm.answerer = Counting(lm.answerer, scored)
    (total,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert [token for part in scored for token in part] == lm.tokenizer_.encode(text)
    assert total == -len(scored)


class Counting:
    """An answerer that scores every window -1 and keeps what it was asked to score, in order."""

    def __init__(self, inner, scored):
        self.inner, self.scored = inner, scored
        self.samples, self.longest, self.fit = 1, inner.longest, inner.fit
        self.tokens_per_second = inner.tokens_per_second

    def score(self, pairs):
        self.scored += [continuation for _, continuation in pairs]
        return [{"ll": -1.0, "greedy": False} for _ in pairs]


def test_chat_template_and_prefix_of_the_reply():
    lm = lm_of()
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer is"}]
    assert lm.apply_chat_template(turns[:1]) == lm.tokenizer_.chat_text(turns[:1])
    assert (
        lm.apply_chat_template(turns, add_generation_prompt=False)
        == lm.tokenizer_.chat_text(turns[:1]) + "The answer is"
    )


def test_a_tokenizer_without_a_template_is_told(monkeypatch):
    lm = lm_of()
    monkeypatch.setattr(lm.tokenizer_.fast, "chat_template", None)
    with pytest.raises(ConfigError, match="no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "hi"}])


def test_the_cost_is_known_before_the_work(caplog):
    caplog.set_level(logging.INFO, HARNESS)
    lm = lm_of(batch_size=4)
    dry = EstimatingLM(lm.answerer)
    dry.generate_until(generating())
    assert (dry.cost.answers, dry.cost.forwards) == (8, 24)
    assert dry.cost.tokens > 24 * 12 * 4
    assert "8 answers, at most 24 forwards" in str(dry.cost)
    lm.generate_until(generating())
    assert lm.cost.tokens == dry.cost.tokens
    assert "8 answers, at most 24 forwards" in caplog.text


def test_no_forward_is_timed_where_nothing_is_left_to_answer_or_nobody_reads_it(tmp_path, caplog, monkeypatch):
    timed = []
    real = Responder.tokens_per_second
    monkeypatch.setattr(Responder, "tokens_per_second", lambda *given: (timed.append(given[1:]), real(*given))[1])
    caplog.set_level(logging.WARNING, HARNESS)
    lm_of(batch_size=4).generate_until(generating())
    assert timed == []
    caplog.set_level(logging.INFO, HARNESS)
    for kept in (3, 0):  # the second time all three batches are kept
        timed.clear()
        lm = lm_of(batch_size=4)
        lm.store = AnswerStore(tmp_path, Shard())
        lm.generate_until(generating())
        assert (len(timed), lm.cost.answers) == ((1, 8) if kept else (0, 0))
    lm = lm_of(batch_size=4)
    lm.store = AnswerStore(tmp_path / "rank", Shard(1, 2))
    lm.generate_until(generating())
    assert timed == []  # the first rank's word counts


def test_a_cost_at_a_given_rate_needs_no_weights(tmp_path):
    model, tokenizer = tiny_pair()
    save_model(model, tmp_path / "m", tokenizer)
    known = EstimatingLM(lm_of(batch_size=4).answerer, 1000.0)
    known.generate_until(generating())
    (tmp_path / "m" / "model.safetensors").unlink()
    shapes = Responder(load_model(tmp_path / "m", device="meta"), tokenizer, known.options)
    blind = EstimatingLM(shapes, 1000.0)
    blind.generate_until(generating())
    assert blind.cost == known.cost
    assert blind.cost.hours == pytest.approx(blind.cost.tokens / 1000 / 3600)


def test_lm_evals_arguments_in_the_names_of_the_reference_evaluators(tmp_path):
    model, tokenizer = tiny_pair()
    save_model(model, tmp_path / "m", tokenizer)
    line = (
        f"pretrained={tmp_path / 'm'},max_new_tokens=8,steps=4,block_size=8,cfg_scale=0.0,mc_num=16,"
        "suppress_tokens=[],begin_suppress_tokens=[1;5]"
    )
    lm = get_model("llada").create_from_arg_string(line, {"batch_size": "auto", "device": "cuda:0"})
    assert isinstance(lm, LladaLM)
    assert lm.options.settings.samples == 16
    params = replace_params(lm, "x")
    assert (params.max_new_tokens, params.steps, params.defer_tokens, params.forbid_tokens) == (8, 4, (1, 5), ())
    direct = LladaLM(Responder(model, tokenizer, replace(lm.options, batch_size=1)))
    assert lm.generate_until(generating()) == direct.generate_until(generating())
    with pytest.raises(ConfigError, match="'stepz'; did you mean 'steps'"):
        get_model("llada").create_from_arg_string(f"pretrained={tmp_path / 'm'},stepz=4")
    with pytest.raises(ConfigError, match="pretrained"):
        get_model("llada").create_from_arg_string("steps=4")


@pytest.mark.parametrize(
    ("said", "cache"),
    [
        ("use_cache=none", "none"),
        ("use_cache=prefix,threshold=0.9", "prefix"),
        ("use_cache=dual,factor=1.0", "dual"),
        ("use_cache=True,show_speed=True", "prefix"),
        ("use_cache=True,dual_cache=True,threshold=0.9", "dual"),
        ("use_cache=False", "none"),
    ],
)
def test_the_names_of_fast_dllm_and_its_caches(tmp_path, said, cache):
    model, tokenizer = tiny_pair()
    save_model(model, tmp_path / "m", tokenizer)
    for name in ("llada", "llada_dist", "fastdllm_llada"):
        lm = get_model(name).create_from_arg_string(f"model_path={tmp_path / 'm'},length=8,block_length=8,{said}")
        assert replace_params(lm, "x").cache == cache


def test_the_stock_estimator_can_be_asked_for_and_its_error_is_told(tmp_path):
    model, tokenizer = tiny_pair()
    save_model(model, tmp_path / "m", tokenizer)
    where = f"pretrained={tmp_path / 'm'},mc_num=4"
    stock = get_model("llada_dist").create_from_arg_string(f"{where},estimator=stock")
    long = scoring([(f"{i} is", " one of the numbers that come after it") for i in range(32)])
    values = stock.loglikelihood(long)
    context, continuation = tokenizer.encode("0 is"), tokenizer.encode(" one of the numbers that come after it")
    expected = log_likelihood(stock.answerer.model, context, continuation, samples=4, estimator="stock")
    assert values[0][0] == pytest.approx(expected, abs=1e-4)
    antithetic = get_model("llada").create_from_arg_string(where)
    antithetic.loglikelihood(long)
    assert stock.estimator_error() > antithetic.estimator_error() > 0
    exact = lm_of()
    exact.loglikelihood(scoring([(f"{i} is", " x") for i in range(40)]))
    assert exact.estimator_error() == pytest.approx(0.0, abs=1e-4)
    few = lm_of()
    few.loglikelihood(scoring(PAIRS))
    assert few.estimator_error() is None
    surest = get_model("llada").create_from_arg_string(f"{where},estimator=confidence")
    (first, *_) = surest.loglikelihood(long)
    expected = log_likelihood(stock.answerer.model, context, continuation, estimator="confidence")
    assert first[0] == pytest.approx(expected, abs=1e-4)
    assert surest.estimator_error() is None
    asked = [(("", ""), [1] * n, [2] * n) for n in (3, 5)]
    assert surest._looks([0, 1], [pair[1:] for pair in asked]) == 5
    with pytest.raises(ConfigError, match="estimator"):
        get_model("llada").create_from_arg_string(f"{where},estimator=stocks")
