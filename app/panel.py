"""The sidebar: a model and the settings of its sampler."""

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.canvas import Frame
from app.conversation import LiveAnswer
from app.models import AppState, LoadedModel, ModelIndex, UserError, as_user_error, due, paced, sentence
from app.render import canvas, notice
from llada_core.sampling.params import MODES, PRESETS, SamplingParams, exactness
from llada_core.sampling.params import preset as made_by
from llada_core.settings import SettingInfo, describe

SETTINGS = {name: info for name, info in describe(SamplingParams).items() if name != "rule"}  # names code to be run
MOST_TOKENS = 1024
LONGEST = 2000  # characters of a value, which an error repeats


def params(values: Mapping[str, Any]) -> SamplingParams:
    """The settings as the person left them; raises UserError with one sentence for a value out of range."""
    given: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        value = values.get(name, setting.default)
        if isinstance(value, str) and len(value) > LONGEST:
            raise UserError(f"{name}: {len(value):,} characters are no setting.")
        if value is None or value == "":
            value = setting.default
        given[name] = _tokens(name, value) if setting.kind == "list" else value
    with as_user_error():
        made = SamplingParams(**given)
    if made.max_new_tokens > MOST_TOKENS:
        raise UserError(f"max_new_tokens is {made.max_new_tokens}; this page writes at most {MOST_TOKENS} at a time.")
    return made


def _tokens(name: str, value: Any) -> tuple[int, ...]:
    parts = [str(part) for part in value] if isinstance(value, list | tuple) else str(value).replace(",", " ").split()
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"{name}: write token numbers with commas between them (got {value!r})")
    return tuple(int(part) for part in parts)


FIRST = ("max_new_tokens", "steps", "block_length", "temperature", "threshold")  # the rest folds away
FAST = "cache=prefix,threshold=0.9"  # the preset, as `llada eval --speed` takes it


def cost_of_fast(index: ModelIndex, name: str) -> str:
    """What the preset costs a model in accuracy, where that was measured here; else how to measure it."""
    if found := index.measured(name, FAST):
        return (
            f"Measured here for this model: {'; '.join(f'{key} {told}' for key, told in found.items())} (points, 95 %)."
        )
    return f"What it costs this model in accuracy was not measured here: llada eval BENCHMARK -m {name} --speed {FAST} does."


Values = Mapping[Any, Any]
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class Panel:
    """The components of the sidebar."""

    model: gr.Dropdown
    preset: gr.Radio
    guesses: gr.Checkbox
    knobs: dict[str, gr.components.Component]

    @property
    def inputs(self) -> set[gr.components.Component]:
        """What every generating handler reads."""
        return {self.model, self.guesses, *self.knobs.values()}

    def params(self, values: Values) -> SamplingParams:
        """The settings in a handler's values; raises UserError."""
        return params({name: values[knob] for name, knob in self.knobs.items()})

    def live(
        self,
        loaded: LoadedModel,
        answer: LiveAnswer,
        frames: Generator[Frame, None, None],
        values: Values,
        params: SamplingParams,
        draw: Callable[..., str] = canvas,
    ) -> Generator[str, None, None]:
        """A picture of each frame of `answer`, in `answer.shown_in` seconds; the last is settled and says what it cost."""
        watch = bool(values[self.guesses])

        def when(number: int) -> float:
            return 0.0 if answer.stopping else due(number, params, answer.shown_in)

        with closing(frames):
            for frame in paced(frames, when):
                yield draw(frame, answer.trace.texts(frame, guesses=watch), frame.caption)
        if answer.counts:
            last = answer.trace.frames[-1].settled()
            yield draw(last, answer.trace.texts(last), f"{loaded.name} · {answer.counts.sentence()}")

    def shown(self, params: SamplingParams) -> list[Any]:
        """Updates for all knobs, in their order."""
        return [_shown(getattr(params, name)) for name in self.knobs]


def build_panel(state: AppState) -> Panel:
    """Draws the sidebar and wires presets to knobs."""
    start = state.index.usage(state.model).sampling
    model = gr.Dropdown(
        choices(state), value=state.model, label="Model", allow_custom_value=True, elem_id="model",
        info="an alias, a version, or a model folder" if state.named is None else "one of those that this page was started with",
    )  # fmt: skip

    def told(params: SamplingParams, chosen: str | None, name: str) -> str:
        return exactness(params) + (f" {cost_of_fast(state.index, name)}" if chosen == "fast" else "")

    modes = MODES if start.sampler else ()
    preset = gr.Radio(["recommended", *modes, *PRESETS], value="recommended", label="Preset")
    exact = gr.HTML(notice(told(start, "recommended", state.model)), elem_id="exactness", apply_default_css=False)
    made = {name: _component(SETTINGS[name], getattr(start, name)) for name in FIRST}
    guesses = gr.Checkbox(False, label="Show guesses", info="what the model would write now at every masked position")
    with gr.Accordion("All settings", open=False):
        rest = (setting for name, setting in SETTINGS.items() if name not in FIRST)
        made |= {setting.name: _component(setting, getattr(start, setting.name)) for setting in rest}
    panel = Panel(model, preset, guesses, {name: made[name] for name in SETTINGS})

    def named(name: str, values: Values) -> SamplingParams:
        base = state.index.usage(state.allowed(values[model])).sampling
        if name == "recommended":
            return base
        return made_by(name, base.at_length(int(values[panel.knobs["max_new_tokens"]] or base.max_new_tokens)))

    def describe(values: Values) -> tuple[str | None, str]:
        try:
            params, chosen = panel.params(values), values[preset] or "recommended"
            chosen = chosen if params == named(chosen, values) else None
            return chosen, notice(told(params, chosen, values[model] or state.model))
        except Exception as error:  # noqa: BLE001 - shown to the person, the page lives on
            return None, notice(sentence(error), "bad")

    def choose(values: Values) -> list[Any]:
        try:
            chosen = values[preset] or "recommended"
            base = named(chosen, values)
            return [*panel.shown(base), chosen, notice(told(base, chosen, values[model] or state.model))]
        except Exception as error:  # noqa: BLE001 - shown to the person, the page lives on
            return [*[gr.skip()] * len(panel.knobs), gr.skip(), notice(sentence(error), "bad")]

    outputs, read = [*panel.knobs.values(), preset, exact], {preset, model, *panel.knobs.values()}
    gr.on([preset.input, model.change], choose, read, outputs, **QUICK)
    changed = [knob.change for knob in panel.knobs.values()]  # `input` misses the first key after a value was set
    gr.on(changed, describe, read, [preset, exact], trigger_mode="always_last", **QUICK)
    return panel


def speed_control(state: AppState, name: str) -> gr.Radio:
    """How fast an answer is shown."""
    return gr.Radio(
        list(state.speeds), value=state.speed, label="Speed", show_label=False, container=False, min_width=270, scale=0,
        elem_id=name, elem_classes="speed",
    )  # fmt: skip


def choices(state: AppState) -> list[str]:
    """The models that can be chosen; any other name can be typed where the page is for this machine alone."""
    return list(dict.fromkeys([state.model, *state.index.names()])) if state.named is None else list(state.named)


def _component(setting: SettingInfo, value: Any) -> gr.components.Component:
    told: dict[str, Any] = {"label": setting.name, "info": setting.description + _range(setting)}
    told["elem_id"] = f"setting-{setting.name}"
    if setting.kind == "choice":
        return gr.Dropdown([*[("off", "")] * setting.optional, *setting.choices], value=_shown(value), **told)
    if setting.kind == "switch":
        return gr.Checkbox(value, **told)
    if setting.kind == "list" or setting.optional:
        return gr.Textbox(_shown(value), **told, placeholder="off")
    step = 1 if setting.kind == "integer" else 0.05
    # Without `minimum` and `precision`, which Gradio checks before any handler is asked: the answer would never begin.
    return gr.Number(value, **told, step=step)


def _range(setting: SettingInfo) -> str:
    limits = [
        f"from {setting.low:g}" if setting.low is not None else "",
        f"to {setting.high:g}" if setting.high is not None else "",
    ]
    told = " ".join(part for part in limits if part)
    empty = "may be left empty" if setting.optional else ""
    return f" ({', '.join(part for part in (told, empty) if part)})" if told or empty else ""


def _shown(value: Any) -> Any:
    if isinstance(value, tuple):
        return ", ".join(str(v) for v in value)
    return "" if value is None else value
