"""A canvas, a conversation, a replay as HTML."""

import html
import json
from collections.abc import Iterable, Sequence
from importlib.resources import files

from app.canvas import DONE, END, FRESH, OPEN, REPLACED, Frame, Trace, readable
from app.conversation import Turn
from app.guide import Verdict

STATE_CLASSES = ("g", "m", "d f", "d", "d f e")  # of app.canvas.STATES; a written one has its shade c0 to c4 as well
AFTER = "d z"  # written behind the end of the answer: no part of it
LEGEND = (
    ("m", "", "masked"),
    ("m b", "", "masked, in the present block"),
    ("m", "42", "its present guess"),
    ("d f c4", "42", "just written"),
    ("d f e c4", "42", "just put in the place of another token"),
    ("d c0", "42", "written, unsure"),
    ("d c2", "42", "written, fairly sure"),
    ("d c4", "42", "written, sure"),
    ("d c4", END, "the answer ends"),
    (AFTER, "42", "behind the end, no part of the answer"),
    ("g", "42", "given"),
)


def escape(text: str) -> str:
    """Text made inert in HTML, and in the two template languages that Gradio's HTML component runs."""
    return html.escape(text).replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;").replace("`", "&#96;")


def classes(frame: Frame, at: int) -> str:
    """The CSS classes of a position's state, and of the shade of its confidence where it was written."""
    state = frame.state[at]
    return STATE_CLASSES[state] + (f" c{frame.level(at)}" if state in (FRESH, DONE, REPLACED) else "")


def tile(frame: Frame, at: int, text: str, *, after: bool = False) -> str:
    """One position; `after`: it is behind the end of the answer, and written or given it counts for nothing."""
    shown = escape(text)
    dead = after and frame.state[at] != OPEN
    hint = ' title="behind the end of the answer"' if dead else f' title="{shown}"' if len(text) > 5 else ""
    kind = AFTER if dead else classes(frame, at) + (" b" if frame.in_block(at) else "")
    return f'<i class="{kind}"{hint}>{shown}</i>'


def canvas(frame: Frame, texts: Sequence[str], caption: str = "", *, ends: bool = True) -> str:
    """The whole canvas; `texts` (W) stand at its positions; `ends`: the first end token written ends what they say."""
    size = " small" if len(texts) > 200 else ""
    written = (at for at, text in enumerate(texts) if text == END and frame.state[at] != OPEN)
    end = next(written, len(texts)) if ends else len(texts)
    tiles = "".join(tile(frame, at, text, after=at > end) for at, text in enumerate(texts))
    label = f"canvas: {frame.written} of {len(texts)} positions written"
    head = f'<p class="cap">{escape(caption) or "&nbsp;"}</p>'
    return f'<div class="lf">{head}<div class="tiles{size}" role="img" aria-label="{label}">{tiles}</div></div>'


def legend() -> str:
    """What the tiles mean."""
    items = "".join(f'<span><i class="{c}">{escape(t)}</i> {escape(name)}</span>' for c, t, name in LEGEND)
    return f'<div class="lf legend">{items}</div>'


def notice(text: str, kind: str = "info") -> str:
    """A sentence for the person: `kind` is info, good or bad."""
    return f'<div class="lf note {kind if text else "none"}" role="status">{escape(readable(text)) or "&nbsp;"}</div>'


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values in two columns."""
    body = "".join(
        f"<tr><th scope=row>{escape(name)}</th><td>{escape(readable(value))}</td></tr>" for name, value in rows
    )
    return f'<table class="lf facts">{body}</table>'


def conversation(turns: Sequence[Turn], *, live: str = "", note: str = "", kind: str = "info", empty: str = "") -> str:
    """Questions, answers and what can be said of them; `live`, the HTML of a canvas, belongs to the last turn.

    `empty` is the HTML that stands where there are no turns; `CLICKS` wires the buttons.
    """
    parts = []
    for number, turn in enumerate(turns):
        last = number == len(turns) - 1
        edit = f"<button type=button data-act=edit data-turn={number}>Edit and resend</button>"
        copy = "<button type=button data-act=copy>Copy</button>"
        parts.append(
            f'<div class="turn user"><div class="said">{escape(readable(turn.user))}</div><div class="acts">{edit}{copy}</div></div>'
        )
        said = (
            f'<div class="said">{escape(readable(turn.answer))}</div>'
            if turn.answer is not None
            else '<div class="said wait">writing</div>'
        )
        acts = f'<div class="acts">{copy}</div>' if turn.answer else ""
        parts.append(f'<div class="turn model">{said}{verdict(turn.verdict)}{live if last else ""}{acts}</div>')
    if not turns:
        parts.append(empty)
    if note:
        parts.append(notice(note, kind))
    return f'<div class="lf talk" role="log" aria-label="conversation">{"".join(parts)}</div>'


def verdict(judged: Verdict | None) -> str:
    """Whether an answer is right, with a sign beside the colour."""
    if judged is None:
        return ""
    sign, kind = {True: ("✓", "good"), False: ("✗", "bad"), None: ("?", "")}[judged.right]
    return f'<div class="verdict {kind}">{sign} {escape(judged.text)}</div>'


CLICKS = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-act]');
  if (!button) return;
  const said = button.closest('.turn').querySelector('.said');
  if (button.dataset.act !== 'copy') return trigger('edit', {turn: Number(button.dataset.turn)});
  const range = document.createRange();
  range.selectNodeContents(said);
  getSelection().removeAllRanges();
  getSelection().addRange(range);
  if (navigator.clipboard) navigator.clipboard.writeText(said.textContent); else document.execCommand('copy');
  button.textContent = 'Copied';
});
const frame = element.closest('#talk') || element;
let turns = 0, atEnd = true;  // who scrolled up to read is not pulled down by the next step, only by the next question
frame.addEventListener('scroll', () => { atEnd = frame.scrollHeight - frame.scrollTop - frame.clientHeight < 40; });
watch('value', () => {
  const now = element.querySelectorAll('.turn').length;
  if (atEnd || now !== turns) frame.scrollTop = frame.scrollHeight;
  turns = now;
});
"""


LETTERS = "gmfde"  # the states of app.canvas.STATES


def document(trace: Trace, *, prompt: str = "", dark: bool = False) -> str:
    """The whole file of a spelled trace; `prompt` stands above the canvas."""
    data = json.dumps(record(trace, prompt), separators=(",", ":")).replace("<", "\\u003c")
    folder = files("app")
    parts = {
        "@THEME@": "dark" if dark else "light",
        "@TITLE@": "How this answer was written",
        "@CSS@": (folder / "page.css").read_text(encoding="utf-8"),
        "@DATA@": data,
    }
    text = (folder / "replay.html").read_text(encoding="utf-8")
    for mark, part in parts.items():
        text = text.replace(mark, part, 1)
    return text


def frame(text: str, height: int = 560) -> str:
    """A document inside the page, without access to it."""
    return (
        f'<iframe class="lf-replay" title="replay" sandbox="allow-scripts allow-downloads" srcdoc="{escape(text)}" '
        f'style="width:100%;height:{height}px;border:1px solid #8a94a3;border-radius:6px"></iframe>'
    )


def record(trace: Trace, prompt: str) -> dict[str, object]:
    """The trace as JSON: texts once; per frame text numbers `t`, per cent `c`, states `s`, block `b`, forwards `n`."""
    texts: dict[int, int] = {}

    def number(token: int) -> int:
        return -1 if token < 0 else texts.setdefault(token, len(texts))

    frames = []
    for one in trace.frames:
        shown = [int(g if s == OPEN else t) for t, g, s in zip(one.tokens, one.guesses, one.state, strict=True)]
        sure = [-1 if c != c else round(100 * min(1.0, max(0.0, c))) for c in one.confidence.tolist()]
        letters = "".join(LETTERS[s] for s in one.state.tolist())
        frames.append({"t": [number(t) for t in shown], "c": sure, "s": letters, "b": one.block, "n": one.forwards})
    runners = {
        str(at): [[number(token), round(100 * share)] for token, share in others]
        for at, others in trace.runners.items()
    }
    return {
        "prompt": readable(prompt),
        "frames": frames,
        "order": trace.committed_at.tolist(),
        "runners": runners,
        "end": END,
        "texts": [trace.spellings[token] for token in texts],
    }


def empty() -> str:
    """What stands in the replay view before anything was written."""
    return notice("Nothing to replay yet: ask something in Chat first.")
