"""The views Chat and Compare."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import gradio as gr

from app.canvas import Trace, readable
from app.card import score_rows, welcome
from app.conversation import Conversation, LiveAnswer, prompt_ids, question
from app.guide import judged, offered
from app.models import AppState, UserError, errors_as_text
from app.panel import QUICK, Panel, Values, choices, speed_control
from app.render import CLICKS, conversation, legend, notice, table, verdict
from llada_core.sampling.params import PRESETS, preset

Shown = tuple[Any, ...]


@dataclass(frozen=True)
class ChatView:
    """The components that the handlers read and write."""

    state: AppState
    panel: Panel
    session: gr.State  # Conversation, or None before the first question and after a long absence
    editing: gr.State  # the number of the turn that Send replaces, or None
    talk: gr.HTML
    box: gr.Textbox
    system: gr.Textbox
    speed: gr.Radio

    @property
    def read(self) -> set[Any]:
        """What quick handlers read."""
        return {self.session, self.box, self.system, self.editing, self.panel.model}

    def ask(self, values: Values) -> Shown:
        """Adds the message to the conversation; the answer is another event's work."""
        chat, text, turn = values[self.session] or Conversation(), values[self.box] or "", values[self.editing]
        chat.system = values[self.system] or ""
        if turn is not None and not text.strip():
            return chat, self.talk_of(chat, values), "", None
        try:
            if turn is None:
                chat.ask(text)
            else:
                chat.edit(turn, text)
        except UserError as error:
            return *self._refused(chat, values, error), text, turn
        return chat, self.talk_of(chat, values), "", None

    def pick(self, values: Values, sample: str) -> Shown:
        """Asks an example at once; while an answer is written it goes into the box."""
        return self.ask({**values, self.box: sample, self.editing: None})

    def _refused(self, chat: Conversation, values: Values, error: UserError) -> tuple[Any, str]:
        chat.told = str(error) if chat.writing else ""  # the next frame would paint it over
        return chat, self.talk_of(chat, values, str(error), "bad")

    def reply(self, values: Values) -> Iterator[Shown]:
        """Writes the answer that is waited for, if one is; a question that could not be answered returns to the box."""
        chat: Conversation | None = values[self.session]
        yield (gr.skip(),) * 4  # a generator without a value would empty the conversation on the page
        if chat is not None and chat.waiting and not chat.writing:
            yield from errors_as_text(lambda: self._frames(chat, values), lambda text: self._failed(chat, values, text))

    def _frames(self, chat: Conversation, values: Values) -> Iterator[Shown]:
        def shown(note: str) -> Shown:
            return chat, self.talk_of(chat, values, note), gr.skip(), gr.skip()

        live, name = chat.last, values[self.panel.model]
        loaded, moved = yield from self.state.bring(name, lambda text: shown(text if chat.last is live else ""))
        if chat.last is not live or chat.writing or not chat.waiting:  # written or left while the model was read
            return
        params, watch = self.panel.params(values), bool(values[self.panel.guesses])
        live.shown_in = self.state.speeds[values[self.speed]]
        frames = chat.reply(loaded, params, look_ahead=watch, limit=self.state.seconds)
        with closing(self.panel.live(loaded, live, frames, values, params)) as pictures:
            for picture in pictures:
                if chat.last is not live:  # a new conversation was begun
                    break
                chat.picture = picture
                yield shown(chat.told or live.note or moved)
        if chat.last is live or chat.last is not chat.kept[1]:  # answered, or left for a new conversation
            yield shown(live.note or moved if chat.last is live else "")
        else:
            yield self._failed(chat, values, live.note, "info")

    def _failed(self, chat: Conversation, values: Values, text: str, kind: str = "bad") -> Shown:
        chat.give_up()
        back = chat.returned if chat.returned[0] else (gr.skip(), gr.skip())
        return chat, self.talk_of(chat, values, text, kind), *back

    def acting(self, act: Callable[[Conversation], str | None]) -> Callable[[Values], Shown]:
        """A handler that changes the conversation; a text that `act` returns goes into the box."""

        def handle(values: Values) -> Shown:
            chat, text = values[self.session] or Conversation(), values[self.box] or ""
            try:
                text = act(chat) or text
            except UserError as error:
                return *self._refused(chat, values, error), text, None
            return chat, self.talk_of(chat, values), text, None

        return handle

    def edit(self, values: Values, turn: int) -> Shown:
        """Puts a question back into the box; Send then replaces it, or leaves it when the box is empty."""
        chat: Conversation | None = values[self.session]
        if chat is None or turn >= len(chat.turns):
            return gr.skip(), "", None
        said = f"Send replaces question {turn + 1} and what follows it; sent empty, it stays as it was."
        return self.talk_of(chat, values, said), chat.turns[turn].user, turn

    def hurry(self, chat: Conversation | None, speed: str) -> None:
        """The answer that is being shown goes on at another speed."""
        if chat is not None:
            chat.last.shown_in = self.state.speeds[speed]

    def talk_of(self, chat: Conversation, values: Values, note: str = "", kind: str = "info") -> str:
        """The conversation as HTML, the last canvas with its answer; before the first question what the model is."""
        empty = "" if chat.turns else introduction(self.state, values[self.panel.model])
        return conversation(chat.turns, live=chat.picture, note=note, kind=kind, empty=empty)

    def meet(self, values: Values) -> tuple[Any, Any]:
        """Another model was chosen: its examples, and what it is if nothing was asked yet."""
        chat, samples = values[self.session], examples_of(self.state, values[self.panel.model])
        talk = self.talk_of(chat or Conversation(), values) if chat is None or not chat.turns else gr.skip()
        return talk, gr.Dataset(samples=samples, visible=bool(samples))


def introduction(state: AppState, name: str | None) -> str:
    """What a model is, can do and cannot, as HTML."""
    name = name or state.model
    return welcome(state.index.usage(name), state.index.scores(name))


def examples_of(state: AppState, name: str | None) -> list[list[str]]:
    """The questions to offer for a model, each a row of one."""
    name = name or state.model
    return [[text] for text in offered(state.index.usage(name), state.index.scores(name))]


def build_chat(state: AppState, panel: Panel, session: gr.State) -> None:
    """Draws the view and wires it."""
    start = conversation([], empty=introduction(state, None))
    talk = gr.HTML(start, js_on_load=CLICKS, apply_default_css=False, elem_id="talk")
    with gr.Row(elem_id="ask"):
        box = gr.Textbox(
            label="Message", show_label=False, container=False, lines=1, max_lines=6, scale=6, min_width=200,
            autofocus=True, placeholder="Ask something", elem_id="message",
        )  # fmt: skip
        send = gr.Button("Send", variant="primary", scale=1, min_width=80, elem_id="send")
        stop = gr.Button("Stop", variant="secondary", scale=1, min_width=80, elem_id="stop")
        speed = speed_control(state, "speed")
    with gr.Row(elem_id="turns"):
        again = gr.Button("Write again", size="sm", scale=0, min_width=110, elem_id="again")
        undo = gr.Button("Undo", size="sm", scale=0, min_width=80, elem_id="undo")
        new = gr.Button("New conversation", size="sm", scale=0, min_width=140, elem_id="new")
    samples = examples_of(state, None)
    examples = gr.Dataset(
        components=[box], samples=samples, label="Examples: click to ask", elem_id="examples", visible=bool(samples)
    )
    line = gr.HTML(legend(), apply_default_css=False, elem_id="line")
    with gr.Accordion("How does this work?", open=False):
        gr.Markdown(HOW)
    with gr.Accordion("System prompt", open=False):
        own = state.index.usage(state.model).system or "What the model is told before the conversation"
        system = gr.Textbox(show_label=False, label="System prompt", lines=2, elem_id="system", placeholder=own)
    view = ChatView(state, panel, session, gr.State(None), talk, box, system, speed)
    wire_chat(view, (send, stop, again, undo, new), examples, line)


def wire_chat(view: ChatView, buttons: Sequence[gr.Button], examples: gr.Dataset, line: gr.HTML) -> None:
    """Says what each button, key and example does."""
    send, stop, again, undo, new = buttons
    session, talk, box, panel = view.session, view.talk, view.box, view.panel
    shown = [session, talk, box, view.editing]
    slow = {"show_progress_on": line, **view.state.queue()}
    written = [view.reply, {session, view.speed, *panel.inputs}, shown]
    for event in (box.submit, send.click):
        event(view.ask, view.read, shown, **QUICK).then(*written, **slow)

    def pick(values: Values) -> Shown:
        return view.pick(values, values[examples][0])

    def edit(values: Values, event: gr.EventData) -> Shown:
        return view.edit(values, int(event.turn))

    examples.click(pick, {examples, *view.read}, shown, **QUICK).then(*written, **slow)
    again.click(view.acting(Conversation.again), view.read, shown, **QUICK).then(*written, **slow)
    undo.click(view.acting(Conversation.undo), view.read, shown, **QUICK)
    new.click(view.acting(Conversation.clear), view.read, shown, **QUICK)
    stop.click(lambda chat: chat.stop() if chat else None, [session], None, **QUICK)
    view.speed.input(view.hurry, [session, view.speed], None, **QUICK)
    talk.edit(edit, view.read, [talk, box, view.editing], **QUICK)
    panel.model.change(view.meet, view.read, [talk, examples], **QUICK)


HOW = """An answer is a row of positions, its **canvas**. At first every position is a mask. In each **step** the model looks once at
the question and the whole canvas (a **forward**), guesses every masked position, and writes down the guesses of which it is surest;
what is written stays, and helps to guess the rest. An **end mark** (∎) says that the answer ends there; what stands behind it
is no part of it. Longer answers are written in **blocks**, one after the other. As many steps as positions is the plain way; fewer
steps are faster and may cost accuracy. *Show guesses* in the sidebar shows what would be written now; *Replay* shows an answer again."""


AS_SET = "as in the sidebar"
Pictures = tuple[Any, ...]


@dataclass(frozen=True)
class ComparedColumn:
    """One of the two columns."""

    model: gr.Dropdown
    preset: gr.Dropdown
    canvas: gr.HTML
    answer: gr.Textbox
    facts: gr.HTML


@dataclass(frozen=True)
class CompareView:
    """The components that the handler reads."""

    state: AppState
    panel: Panel
    question: gr.Textbox
    speed: gr.Radio
    sides: tuple[ComparedColumn, ComparedColumn]

    def run(self, values: Values) -> Iterator[Pictures]:
        """Answers the question twice, a step each in turn."""
        yield from errors_as_text(
            lambda: self._run(values), lambda text: (notice(text, "bad"), "", "", notice(""), "", "")
        )

    def _run(self, values: Values) -> Iterator[Pictures]:
        runs = [self._side(side, values) for side in self.sides]
        index, asked = self.state.index, values[self.question] or ""
        names = [values[side.model] or values[self.panel.model] or self.state.model for side in self.sides]
        facts = [table(score_rows(index.scores(name))) for name in names]
        pictures = ["", ""]
        for both in zip_longest(*(frames for _, frames, _ in runs)):
            pictures = [new or old for new, old in zip(both, pictures, strict=True)]
            yield pictures[0], "", facts[0], pictures[1], "", facts[1]
        left, right = (answer for answer, _, _ in runs)
        said = [
            (verdict(judged(asked, answer.text, index.usage(name))) if answer.whole else "")
            + notice(f"{answer.note} {doubts}".strip())
            for (answer, _, doubts), name in zip(runs, names, strict=True)
        ]
        shown = pictures[0] + said[0], pictures[1] + said[1]
        yield shown[0], readable(left.text), facts[0], shown[1], readable(right.text), facts[1]

    def _side(self, side: ComparedColumn, values: Values) -> tuple[LiveAnswer, Iterator[str], str]:
        """The answer, its pictures as they come, and what of the settings its model did not learn."""
        name = values[side.model] or values[self.panel.model]
        loaded, _ = self.state.loaded(name)
        params, chosen = self.panel.params(values), values[side.preset]
        if chosen == "recommended":
            params = self.state.index.usage(name).sampling
        elif chosen in PRESETS:
            params = preset(chosen, params)
        prompt = prompt_ids(loaded, [question(values[self.question] or "")], params)
        answer, steps = (
            LiveAnswer(Trace(prompt)),
            loaded.write(prompt, params, look_ahead=bool(values[self.panel.guesses])),
        )
        answer.shown_in = self.state.speeds[values[self.speed]]
        frames = answer.run(loaded, steps, limit=self.state.seconds)
        return answer, self.panel.live(loaded, answer, frames, values, params), loaded.doubts(params)


def build_compare(state: AppState, panel: Panel) -> list[gr.Dropdown]:
    """Draws the view and wires it; returns the two choices of a model."""
    with gr.Row():
        first = next(iter(examples_of(state, None)), [""])
        question = gr.Textbox(label="Question for both", value=first[0], scale=5, elem_id="question")
        run = gr.Button("Compare", variant="primary", scale=1, min_width=100, elem_id="compare")
        stop = gr.Button("Stop", scale=1, min_width=80)
        speed = speed_control(state, "compare-speed")
    with gr.Row():
        sides = (_side(state, "left", "exact"), _side(state, "right", "fast"))
    view = CompareView(state, panel, question, speed, sides)
    chosen = {component for side in sides for component in (side.model, side.preset)}
    outputs = [component for side in sides for component in (side.canvas, side.answer, side.facts)]
    event = run.click(view.run, {question, speed, *chosen, *panel.inputs}, outputs, **state.queue())
    stop.click(None, cancels=[event], **QUICK)
    return [side.model for side in sides]


def _side(state: AppState, name: str, first: str) -> ComparedColumn:
    with gr.Column(min_width=320):
        with gr.Row():
            model = gr.Dropdown(
                choices(state), value=state.model, label="Model", allow_custom_value=True, scale=3, min_width=260,
                elem_id=f"{name}-model",
            )  # fmt: skip
            ways = [AS_SET, "recommended", *PRESETS]
            choice = gr.Dropdown(ways, value=first, label="Settings", elem_id=f"{name}-preset", scale=2, min_width=120)
        picture = gr.HTML(notice(""), apply_default_css=False, elem_id=f"{name}-canvas")
        answer = gr.Textbox(label="Answer", interactive=False, buttons=["copy"], lines=2, elem_id=f"{name}-answer")
        facts = gr.HTML(
            table(score_rows(state.index.scores(state.model))), apply_default_css=False, elem_id=f"{name}-scores"
        )
    return ComparedColumn(model, choice, picture, answer, facts)
