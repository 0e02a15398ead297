"""Text that a person types reaches the model unaltered; what is dangerous is made harmless where it is shown.

A case is a line. To add one from a bug report see CONTRIBUTING.md.
"""

import io

import pytest
from rich.console import Console

from app.canvas import parse_template, printable, readable, typed
from app.conversation import Conversation, Turn
from app.models import LoadedModel
from app.render import conversation
from cli.terminal import TerminalChat
from llada_core.sampling.params import SamplingParams
from tests.tiny import tiny_model, tiny_tokenizer

# name: what is typed, and how it is shown (None: as it is)
TYPED = {
    "new emoji": ("🫨 🩵 \U0001fae9 \U0001f6d8", None),
    "a family": ("👩\u200d👩\u200d👧\u200d👦", None),
    "a flag of tags": ("\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f", None),
    "a flag of letters": ("🇳🇴", None),
    "skin and variation": ("👍🏽 ❤\ufe0f ☎\ufe0e", None),
    "Arabic signs of number": ("\u06dd١ \u0600٢", None),
    "Persian joiners": ("می\u200cخواهم", None),
    "marks of direction": ("\u05e9\u05dc\u05d5\u05dd\u200f abc\u200e \u061c1", None),
    "soft hyphen": ("Donau\u00addampf", None),
    "private use": ("\ue0a0 main \U000f0001", None),
    "zero width": ("a\u200bb\u2060c\ufeffd", None),
    "a mark at the start": ("\ufeffabc", None),
    "accents on accents": ("e\u0301\u0300 \u1e69", None),
    "line separators": ("a\u2028b\u2029c", "a\ufffdb\ufffdc"),
    "CRLF": ("a\r\nb\rc", "a\nb\nc"),
    "space around": ("  indented\n", None),
    "an escape": ("\x1b[2J red", "\ufffd[2J red"),
    "overrides of direction": ("\u202eabc\u202c \u2066x\u2069", "\ufffdabc\ufffd \ufffdx\ufffd"),
    "controls": ("a\x00b\x07c\x7f\x85d", "a\ufffdb\ufffdc\ufffd\ufffdd"),
    "a special string": ("<|eot_id|><|mdm_mask|>", None),
    "markup": ("<script>alert(1)</script> [bold]x[/bold] {{ x }} ${y}", None),
    "thinking": ("<think>hidden?</think>visible", None),
}


@pytest.mark.parametrize("name", TYPED)
def test_what_is_typed_reaches_the_model_and_is_shown_harmless(name):
    text, shown = TYPED[name]
    tokenizer = tiny_tokenizer()
    chat = Conversation(system=text)
    chat.ask(text)
    chat.turns[-1].answer = text
    chat.ask(text)
    assert [message["content"] for message in chat.messages()] == [text] * 4
    assert text.strip() in tokenizer.decode(tokenizer.chat_ids(chat.messages()[1:2]), skip_special=False)
    assert tokenizer.decode(tokenizer.encode(typed(text))) == text
    gap = parse_template(f"{text}[[2]]", tokenizer.encode, tokenizer.special.mask_id, 500)
    assert gap[:-2] == tokenizer.encode(text)
    assert readable(text) == (text if shown is None else shown)
    html = conversation([Turn(text, text)])
    assert "<script" not in html
    assert all(character not in html for character in "\x1b\x00\u202e\r")
    assert all(character not in printable(text) for character in "\x1b\x00\u202e\r\n")


def test_the_terminal_chat_sends_what_was_typed_and_shows_what_is_harmless(monkeypatch):
    screen, asked = io.StringIO(), []
    loaded = LoadedModel("tiny", None, tiny_model(), tiny_tokenizer())
    params = SamplingParams(max_new_tokens=4, block_length=4, steps=1)
    talk = TerminalChat(loaded, params, console=Console(file=screen))
    monkeypatch.setattr(talk, "answer", lambda: asked.append(talk.conversation.undo()))
    lines = [*(text.replace("\r", "").replace("\n", "") for text, _ in TYPED.values()), "/quit"]
    monkeypatch.setattr(talk.console, "input", lambda _: lines.pop(0))
    talk.run()
    assert asked == [text.replace("\r", "").replace("\n", "").strip() for text, _ in TYPED.values()]


@pytest.mark.parametrize(
    ("text", "arrives"),
    [
        ("a\ud83d", "a\ufffd"),
        ("\udc00b", "\ufffdb"),
        ("a\ud83d b", "a\ufffd b"),
        ("\ud83d\ude42", "🙂"),
        ("\udcff", "\ufffd"),
    ],
)
def test_halves_of_characters_are_joined_or_replaced_since_they_have_no_tokens(text, arrives):
    chat = Conversation()
    chat.ask(text)
    assert chat.messages() == [{"role": "user", "content": arrives}]
    assert tiny_tokenizer().decode(tiny_tokenizer().encode(arrives)) == arrives
