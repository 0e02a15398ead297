"""A finished denoising as one self-contained HTML file: slider, heat maps, runners-up; also shown inside the page.

Knows traces and the template `replay.html`; does not know models or Gradio. The file asks nothing of the network.
"""

import json
from importlib.resources import files

from app.canvas import OPEN, Trace, readable
from app.render import escape, notice

LETTERS = "gmfd"  # the states of app.canvas.STATES


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
        "texts": [trace.texts.get(token, "?") for token in texts],
    }


def empty() -> str:
    """What stands in the replay view before anything was written."""
    return notice("Nothing to replay yet: ask something in Chat first.")
