"""Dialogues as text: what a chat template writes, cut where replies start, with people's special strings hidden.

Knows chat templates; does not know ids. `Tokenizer.dialogues` makes ids of the parts.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment
from jinja2.exceptions import TemplateError

Message = dict[str, str]
_MARKS = [chr(code) for code in range(0xE000, 0xF900)]  # for private use: nobody writes them, templates pass them on


@dataclass(frozen=True, slots=True)
class Parts:
    """The text of a dialogue: a prompt, then each reply with what follows it; `marks` stand for special strings."""

    texts: list[str]
    marks: dict[str, str]


@dataclass(frozen=True, slots=True)
class Layout:
    """What a template writes around the contents of messages with the same roles: per part, the text between them."""

    frames: list[list[str]]
    trimmed: bool

    def filled(self, contents: Sequence[str]) -> list[str]:
        """The parts with these contents in them."""
        said = iter([content.strip() for content in contents] if self.trimmed else contents)
        parts = []
        for first, *frames in self.frames:
            pieces = [first]
            for frame in frames:
                pieces += next(said), frame
            parts.append("".join(pieces))
        return parts


class ChatTemplate:
    """The chat template of a transformers tokenizer, whose special strings `special` finds."""

    def __init__(self, fast: Any, special: re.Pattern[str]) -> None:
        self._fast, self._special = fast, special
        self._layouts: dict[tuple[str, bool, tuple[str, ...]], Layout | None] = {}
        self._literals: dict[str, list[str]] = {}

    def text(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        """The dialogue as the template writes it; `ValueError` if there is no template, or it refuses the dialogue."""
        try:
            text = self._fast.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the dialogue: {error}") from None
        return str(text)

    def parts(self, messages: Sequence[Message], *, answered: bool) -> Parts:
        """The dialogue (`answered`: up to its last reply; else with the prompt for the next) cut where replies start.

        The template writes every dialogue that it could see something in. Where it cannot, what it writes for the same
        roles is kept and filled, which is several times faster: a template can only look for what it names, so that
        contents which hold none of its strings are to it like any others.
        """
        contents = [message["content"] for message in messages]
        if self._plain(messages, contents):
            key = (self._fast.chat_template, answered, tuple([message["role"] for message in messages]))
            if key not in self._layouts:
                self._layouts[key] = self._layout(messages, contents, answered)
            layout = self._layouts[key]
            if layout is not None:
                return Parts(layout.filled(contents), {})
        return self.written_parts(messages, answered=answered)

    def written_parts(self, messages: Sequence[Message], *, answered: bool) -> Parts:
        """`parts` as the template itself writes them.

        A reply starts behind what the template writes for the messages before it and a generation prompt. An earlier
        reply that is now announced otherwise (without room for its reasoning, say) is no place to cut.
        """
        hidden, marks = self._hidden(messages)
        replies = [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]
        if answered and replies[-1:] != [len(messages) - 1]:
            raise ValueError("a dialogue that is trained on ends with the assistant's reply to something")
        whole = self.text(hidden, generation_prompt=not answered)
        starts = [0]
        for i in replies:
            before = self.text(hidden[:i], generation_prompt=True)
            if whole.startswith(before):
                starts.append(len(before))
            elif answered and i == replies[-1]:
                raise ValueError("the chat template writes a reply in another way than its generation prompt announces")
        return Parts([whole[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)], marks)

    def _hidden(self, messages: Sequence[Message]) -> tuple[Sequence[Message], dict[str, str]]:
        """The messages with a mark in place of each special string: in the text they would look like the template's.

        The rest of what is said stays as it is, because templates may look into it.
        """
        texts = [text for message in messages for text in message.values() if isinstance(text, str)]
        found = {string for text in texts for string in self._special.findall(text)}
        if not found:
            return messages, {}
        free = (mark for mark in _MARKS if not any(mark in text for text in texts))
        marks = dict(zip(sorted(found), free, strict=False))

        def hide(value: Any) -> Any:
            return self._special.sub(lambda match: marks[match[0]], value) if isinstance(value, str) else value

        hidden = [{key: hide(value) for key, value in message.items()} for message in messages]
        return hidden, {mark: string for string, mark in marks.items()}

    def _plain(self, messages: Sequence[Message], contents: list[str]) -> bool:
        """Whether a template sees nothing in these messages but that something is said, and by whom."""
        said = "\0".join(contents)
        template = self._fast.chat_template
        if not isinstance(template, str):  # none, or several by name
            return False
        if template not in self._literals:
            self._literals[template] = list(_strings_in(template))
        return (
            all(len(message) == 2 for message in messages)
            and all(content and not content.isspace() for content in contents)
            and not any(literal in said for literal in self._literals[template])
            and self._special.search(said) is None
        )

    def _layout(self, messages: Sequence[Message], contents: list[str], answered: bool) -> Layout | None:
        """What is written around contents, if they come once each, in order, either as they are or trimmed."""
        marks = _MARKS[: len(messages)]
        framed = [{**message, "content": f" {mark} "} for message, mark in zip(messages, marks, strict=False)]
        written = self.written_parts(messages, answered=answered)
        try:
            texts = self.written_parts(framed, answered=answered).texts
        except ValueError:
            return None
        if written.marks or len(marks) < len(messages) or [c for c in "".join(texts) if c in marks] != marks:
            return None
        for trimmed, pattern in ((True, f"[{''.join(marks)}]"), (False, f" [{''.join(marks)}] ")):
            layout = Layout([re.split(pattern, text) for text in texts], trimmed)
            if sum(map(len, layout.frames)) == len(texts) + len(marks) and layout.filled(contents) == written.texts:
                return layout
        return None


def _strings_in(template: str) -> Iterator[str]:
    """The strings that a template names, and could look for."""
    for token in Environment().lexer.tokenize(template):
        if token.type == "string" and token.value:  # an empty one finds only empty contents, which are not plain
            yield token.value
