"""Loading, the cache of loaded models, and hot-swap."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from app import models as engines
from app.models import (
    MOST_CONTEXT,
    SPEEDS,
    AppState,
    Clock,
    LoadedModel,
    ModelCache,
    ModelIndex,
    Setting,
    UserError,
    due,
    load,
    opened,
    paced,
)
from llada_core.modeling import save_model
from llada_core.sampling.params import SamplingParams
from llada_core.usage import Usage
from tasks.project import Project
from tests.tiny import tiny_model, tiny_pair, tiny_tokenizer


class Names:
    """Names that lead to folders and can be moved."""

    def __init__(self, **places: Path) -> None:
        self.places = places

    def locate(self, name: str) -> str:
        if name not in self.places:
            raise ValueError(f"no model {name!r} is registered")
        return str(self.places[name])

    def resolve(self, name: str, place: str = "") -> Path:
        return Path(place) if place else self.places[name]

    def usage(self, name: str) -> Usage:
        return Usage()


def test_a_moved_alias_answers_with_the_other_version(model_folder, tmp_path):
    other = tmp_path / "other"
    other.symlink_to(model_folder)
    names = Names(champion=model_folder)
    cache = ModelCache(names)
    first, word = cache.get("champion")
    assert word == ""
    assert cache.get("champion") == (first, "")
    names.places["champion"] = other
    second, word = cache.get("champion")
    assert second is not first
    assert "moved" in word


def test_a_champion_deleted_while_the_page_is_open_goes_on(model_folder):
    names = Names(champion=model_folder)
    cache = ModelCache(names)
    first, _ = cache.get("champion")
    del names.places["champion"]
    again, word = cache.get("champion")
    assert again is first
    assert "no longer in the registry" in word
    with pytest.raises(UserError, match="no model"):
        cache.get("challenger")


def test_two_names_of_one_version_share_it_and_the_oldest_makes_room(model_folder, tmp_path):
    other = tmp_path / "other"
    other.symlink_to(model_folder)
    cache = ModelCache(Names(a=model_folder, b=model_folder, c=other), most=2)
    assert cache.get("a")[0] is cache.get("b")[0]
    cache.get("c")
    assert len(cache._models) == 2


def test_too_little_memory_is_said_before_loading(model_folder, monkeypatch):
    monkeypatch.setattr("llada_core.modeling.place.available_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"cannot be loaded: the model needs about .* GB of memory; 0\.0 GB are free"):
        load("it", Names(it=model_folder))


def test_the_pages_setting_says_where_models_lie(model_folder, monkeypatch):
    with pytest.raises(ValueError, match="bits=4 needs a CUDA GPU"):
        Setting.checked("auto", 4)
    asked = []
    real = engines.load_to_answer
    monkeypatch.setattr(engines, "load_to_answer", lambda folder, **how: (asked.append(how), real(folder))[1])
    ModelCache(Names(it=model_folder), setting=Setting("cuda:1", 8)).get("it")
    assert asked == [{"device": "cuda:1", "bits": 8}]


def test_one_thread_computes_a_small_model_unless_somebody_says_how_many(model_folder, monkeypatch):
    monkeypatch.setattr("app.models.THREADS", 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before, found = torch.get_num_threads(), []
    try:
        for small in (1 << 40, 0):
            monkeypatch.setattr("app.models.SMALL", small)
            opened("tiny", model_folder, Usage())
            found.append(torch.get_num_threads())
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        monkeypatch.setattr("app.models.SMALL", 1 << 40)
        opened("tiny", model_folder, Usage())
        assert [*found, torch.get_num_threads()] == [1, 3, 3]
    finally:
        torch.set_num_threads(before)


def test_a_small_model_takes_no_thread_from_a_large_one_beside_it(monkeypatch):
    def loaded(name, *_):
        weights = [torch.empty({"large": 20_000_000, "small": 10}[name], device="meta")]
        return SimpleNamespace(model=SimpleNamespace(device=torch.device("cpu"), parameters=lambda: weights))

    monkeypatch.setattr("app.models.THREADS", 3)
    monkeypatch.setattr("app.models.load", loaded)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before, cache = torch.get_num_threads(), ModelCache(Names(large="large", small="small"))
    try:
        cache.get("large")
        cache.get("small")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_whether_steps_are_compiled_is_a_setting_of_what_is_loaded(model_folder):
    with pytest.raises(ValueError, match="compile 'grap'; did you mean 'graph'"):
        Setting.checked("auto", None, "grap")
    setting = Setting.checked("auto", None, "graph")
    assert ModelCache(Names(it=model_folder), setting=setting).get("it")[0].engine.compiled == "graph"


def test_several_devices_have_a_copy_each_and_one_queue(model_folder):
    loaded, _ = ModelCache(Names(it=model_folder), setting=Setting.checked("cpu, cpu", None)).get("it")
    assert [peer.model for peer in loaded.engine.peers] == [loaded.model, *loaded.copies]
    assert loaded.model is not loaded.copies[0]
    with pytest.raises(ValueError, match="device 'gpu' is none of"):
        Setting.checked("cpu,gpu", None)


def test_a_folder_that_is_no_model_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded"):
        load("it", Names(it=tmp_path))


def test_special_strings_stay_text_when_many_ask_at_once(loaded):
    asked = [{"role": "user", "content": "<|eot_id|> 12 " * 200}]
    alone = loaded.tokenizer.chat_ids(asked)
    with ThreadPoolExecutor(8) as threads:
        together = [threads.submit(loaded.tokenizer.chat_ids, asked) for _ in range(200)]
    assert all(each.result() == alone for each in together)


def test_a_moved_champion_that_cannot_be_loaded_leaves_the_one_before(model_folder, tmp_path):
    names = Names(champion=model_folder)
    cache = ModelCache(names)
    first, _ = cache.get("champion")
    names.places["champion"] = tmp_path
    for _ in range(2):
        again, word = cache.get("champion")
        assert again is first
        assert "the version before goes on" in word
        assert "cannot be loaded" in word
    names.places["champion"] = model_folder
    assert cache.get("champion") == (first, "")


def test_who_has_a_model_does_not_wait_for_one_that_loads(model_folder, monkeypatch):
    cache = ModelCache(Names(here=model_folder, big=Path("elsewhere")))
    here, _ = cache.get("here")
    begun, may_end = threading.Event(), threading.Event()

    def slow(name, source, setting, place):
        begun.set()
        assert may_end.wait(30)
        return here

    monkeypatch.setattr(engines, "load", slow)
    state = AppState(cache, ModelIndex(Project(model_folder)), "here")
    loading = state.bring("big", str)
    assert re.fullmatch(r"Loading: .* of 0\.0 GB in memory after \d+ s\.", next(loading))
    assert begun.is_set()
    assert cache.get("here") == (here, "")
    may_end.set()
    rest: list[tuple[LoadedModel, str]] = []

    def until_loaded():
        rest.append((yield from loading))

    assert all("memory" in said for said in until_loaded())
    assert rest == [(here, "")]


class Ticking:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.at = 0.0

    def clock(self) -> Clock:
        return Clock(now=lambda: self.at, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        self.at += seconds


@pytest.mark.parametrize(
    ("params", "steps"),
    [
        (SamplingParams(34, 17, 34), 34),
        (SamplingParams(34, 17, 34), 17),
        (SamplingParams(34, 17, 34, threshold=0.999), 6),
        (SamplingParams(34, 17, 34, threshold=0.999), 17),
        (SamplingParams(128, 32, 128, stop_at_eos=True), 128),
        (SamplingParams(512, 32, 512, threshold=0.9), 300),
    ],
)
def test_an_answer_is_shown_in_two_to_four_seconds(params, steps):
    time = Ticking()
    when = [time.at for _ in paced(iter(range(steps)), lambda n: due(n, params, SPEEDS["normal"]), clock=time.clock())]
    assert when[0] == 0.0, "the first step at once"
    assert 1.99 <= time.at <= 4.11
    assert when == sorted(when)


def test_the_rest_is_shown_at_once_when_somebody_wants_it():
    time, speed = Ticking(), [SPEEDS["slow"]]
    shown = paced(iter(range(64)), lambda n: due(n, SamplingParams(64, 64, 64), speed[0]), clock=time.clock())
    next(shown)
    next(shown)
    before, speed[0] = time.at, SPEEDS["instant"]
    assert len(list(shown)) == 62
    assert time.at - before == 0.0


def test_settings_that_the_model_cannot_use_are_refused(loaded):
    with pytest.raises(UserError):
        loaded.write([5], SamplingParams(max_new_tokens=7, block_length=3, steps=5))


def test_a_champion_that_moves_while_it_is_looked_up_is_never_taken_for_the_other(model_folder, tmp_path):
    """What was located is what is loaded: else the version before would answer under the name of the one after."""
    other = tmp_path / "other"
    other.symlink_to(model_folder)

    class Moving(Names):
        def locate(self, name: str) -> str:
            found = super().locate(name)
            self.places[name] = other  # between this look and the next one
            return found

    names = Moving(champion=model_folder)
    cache = ModelCache(names)
    assert cache.get("champion")[0].folder == model_folder
    assert cache.get("champion")[0].folder == other
    names.places["champion"] = model_folder  # rolled back
    assert cache.get("champion")[0].folder == model_folder


def test_what_has_no_room_for_its_keys_and_values_is_refused_with_the_number(loaded, monkeypatch):
    one = loaded.model.new_cache(1, 1)
    size = sum(tensor.nbytes for tensor in (*one.keys, *one.values))
    monkeypatch.setattr("llada_core.modeling.place.available_memory", lambda: 2 * 20 * size)
    small = replace(loaded)
    assert small.engine.positions == 20
    with pytest.raises(UserError, match="a canvas of 24 tokens is larger than the 20 that fit here"):
        next(small.write([1] * 8, SamplingParams(max_new_tokens=16, block_length=16, steps=16)))


def test_where_others_reach_the_page_only_named_models_are_asked(model_folder, tmp_path):
    from app.card import describe
    from app.page import build_page
    from app.panel import choices

    index = ModelIndex(Project(tmp_path))
    state = AppState(ModelCache(index), index, str(model_folder), named=(str(model_folder), "models:/mine@champion"))
    assert state.loaded("")[0].name == state.loaded(f" {model_folder} ")[0].name == str(model_folder)
    assert choices(state) == [str(model_folder), "models:/mine@champion"]
    other = tmp_path / "other"
    other.symlink_to(model_folder)
    for name in (str(other), "GSAI-ML/LLaDA-8B-Instruct", f"{model_folder}/../tiny"):
        with pytest.raises(UserError, match="names further models with --also"):
            state.loaded(name)
        with pytest.raises(UserError, match="names further models with --also"):
            next(state.bring(name, str))
    assert AppState(ModelCache(index), index, str(model_folder)).loaded(str(other))[0].folder == model_folder.resolve()
    show = next(
        f.fn for f in build_page(state).fns.values() if "build_model.<locals>.show" in getattr(f.fn, "__qualname__", "")
    )
    assert "names further models with --also" in show(str(other))
    assert describe(index, str(other))[0].rows[0] == ("name", str(other))


@pytest.mark.parametrize(
    ("host", "share", "named"),
    [("127.0.0.1", False, None), ("0.0.0.0", False, ("nowhere", "b")), ("127.0.0.1", True, ("nowhere", "b"))],
)
def test_the_operator_names_models_with_the_command(host, share, named, monkeypatch):
    from app import __main__ as command

    made = []
    monkeypatch.setattr(engines, "AppState", lambda *given, **named: made.append(named["named"]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command.launch(("nowhere", "b"), ("cpu", None), at_once=1, seconds=1.0, where=(host, 0, share), auth=None)
    assert made == [named]


def test_copies_on_several_devices_take_what_the_smallest_of_them_holds(monkeypatch):
    room = iter([4000, 700])  # of the first device, then of the copy's
    monkeypatch.setattr("app.models.positions_that_fit", lambda one: next(room))
    model = tiny_model()
    loaded = LoadedModel("tiny", None, model, tiny_tokenizer(), copies=(deepcopy(model),))
    assert loaded.engine.positions == 700


def test_a_terminal_is_bounded_by_the_models_own_length_and_a_page_by_its_own(tmp_path):
    model, tokenizer = tiny_pair(max_sequence_length=5000)
    save_model(model, tmp_path / "long", tokenizer)
    assert opened("long", tmp_path / "long", Usage()).context == MOST_CONTEXT
    assert opened("long", tmp_path / "long", Usage(), max_context=None).context == 5000
