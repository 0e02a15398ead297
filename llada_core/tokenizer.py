"""Text and dialogues to ids, the special tokens and the chat template: the one place where a dialogue becomes ids."""

import json
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

from jinja2 import Environment
from jinja2.exceptions import TemplateError
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from llada_core.files import document


@dataclass(frozen=True)
class SpecialTokens:
    """The token ids a masked-diffusion model cannot do without, and the two that only a chat needs."""

    mask_id: int
    eos_id: int
    pad_id: int
    bos_id: int | None = None
    eot_id: int | None = None

    def check(self, vocab_size: int) -> "SpecialTokens":
        """These tokens, once every id lies in `[0, vocab_size)` and MASK is none of the others; else `ValueError`."""
        named = {k: v for k, v in vars(self).items() if v is not None}
        for name, value in named.items():
            if not 0 <= value < vocab_size:
                raise ValueError(f"{name} {value} is outside the vocabulary (0..{vocab_size - 1})")
            if name != "mask_id" and value == self.mask_id:
                raise ValueError(f"{name} is {value}, which is also mask_id; the mask must be a token of its own")
        return self

    @property
    def end_ids(self) -> frozenset[int]:
        """The ids after which an answer is over."""
        return frozenset(i for i in (self.eos_id, self.eot_id) if i is not None)


BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
HEADER_START, HEADER_END, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
SPECIAL_STRINGS = (BOS, EOS, MASK, HEADER_START, HEADER_END, EOT)
"""LLaDA's special strings in the order in which a tokenizer trained here numbers them."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""LLaDA's chat format (LLaDA-8B-Instruct)."""

MASK_STRINGS = (MASK, "<|mask|>", "[MASK]", "<mask>")
EOT_STRINGS = (EOT, "<|role_end|>", "<|im_end|>")


Message = dict[str, str]
_MARKS = [chr(code) for code in range(0xE000, 0xF900)]  # for private use: nobody writes them, templates pass them on


@dataclass(frozen=True, slots=True)
class Segments:
    """The text of a dialogue: a prompt, then each reply with what follows it; `marks` stand for special strings."""

    texts: list[str]
    marks: dict[str, str]


@dataclass(frozen=True, slots=True)
class TemplateLayout:
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
        self._layouts: dict[tuple[str, bool, tuple[str, ...]], TemplateLayout | None] = {}
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

    def parts(self, messages: Sequence[Message], *, answered: bool) -> Segments:
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
                return Segments(layout.filled(contents), {})
        return self.written_parts(messages, answered=answered)

    def written_parts(self, messages: Sequence[Message], *, answered: bool) -> Segments:
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
        return Segments([whole[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)], marks)

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

    def _layout(self, messages: Sequence[Message], contents: list[str], answered: bool) -> TemplateLayout | None:
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
            layout = TemplateLayout([re.split(pattern, text) for text in texts], trimmed)
            if sum(map(len, layout.frames)) == len(texts) + len(marks) and layout.filled(contents) == written.texts:
                return layout
        return None


def _strings_in(template: str) -> Iterator[str]:
    """The strings that a template names, and could look for."""
    for token in Environment().lexer.tokenize(template):
        if token.type == "string" and token.value:  # an empty one finds only empty contents, which are not plain
            yield token.value


# `Tokenizer.dialogues` is the one place where a dialogue becomes ids, whether it is trained on, asked or scored. A
# special string inside a user's text is text, not a command. Threads may share one tokenizer.

_FILES = ("tokenizer_config.json", "tokenizer.json")
_PAIRS = frozenset(("vocab.json", "merges.txt"))  # Dream's, which has Qwen2's tokenizer under a name of its own
_AT_ONCE = 128  # texts: an encoding takes a hundred bytes for each of its tokens


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Ids of a dialogue, and where its replies stand in them: (start, end), the end token included."""

    ids: list[int]
    replies: list[tuple[int, int]]


class Tokenizer:
    """A transformers fast tokenizer with its special ids."""

    def __init__(self, fast: PreTrainedTokenizerFast, special: SpecialTokens | None = None) -> None:
        self.fast = fast
        self._engine_in_use = threading.Lock()  # whether specials are text is a switch on the engine, not of a call
        found = special or _special_tokens(fast)
        if found is None:
            raise ValueError(
                "the tokenizer names no mask token or no end token;"
                " pass special_tokens=SpecialTokens(mask_id=..., eos_id=..., pad_id=...)"
            )
        self.special = found.check(len(fast))
        self._template = ChatTemplate(fast, _special_strings(fast, self.special))

    @classmethod
    def load(cls, folder_or_name: str | Path, special_tokens: SpecialTokens | None = None) -> Self:
        """The tokenizer of a folder or Hub name; `FileNotFoundError` if there is none, `ValueError` if it is unfit."""
        folder = Path(folder_or_name)
        if not folder.exists() and (folder.is_absolute() or len(folder.parts) != 2):
            raise FileNotFoundError(f"{folder}: no such folder (a Hub name has the form owner/name)")
        fast = _stored(folder_or_name)
        if fast is None:
            raise FileNotFoundError(f"{folder}: no tokenizer.json there")
        return cls(fast, special_tokens)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and its configuration, chat template included, into `folder`.

        In words that transformers 4.38, which the official code was made for, reads as well.
        """
        self.fast.save_pretrained(str(folder), save_jinja_files=False)
        _in_older_words(Path(folder))

    @property
    def vocab_size(self) -> int:
        """Ids lie below this, added tokens included."""
        return len(self.fast)

    @property
    def end_ids(self) -> frozenset[int]:
        return self.special.end_ids

    def encode(self, text: str, *, user: bool = True) -> list[int]:
        """Ids of `text` with none added; special strings in it stay text unless `user` is False."""
        return next(self.encode_batch([text], user=user))

    def encode_batch(self, texts: Sequence[str], *, user: bool = True) -> Iterator[list[int]]:
        """`encode` of many texts, by the engine's batch path, in parts that stay in the processor's cache.

        Who lets go of each list before the next keeps ids out of main memory.
        """
        engine = self.fast.backend_tokenizer
        for first in range(0, len(texts), _AT_ONCE):
            with self._engine_in_use:
                engine.encode_special_tokens = user
                try:
                    part = engine.encode_batch_fast(list(texts[first : first + _AT_ONCE]), add_special_tokens=False)
                finally:
                    engine.encode_special_tokens = False
            for encoding in part:
                yield encoding.ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        return str(self.fast.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False))

    def answer_text(self, ids: Iterable[int]) -> str:
        """The text of a generated answer: up to its first end token, without special tokens."""
        kept: list[int] = []
        for token in ids:
            if int(token) in self.end_ids:
                break
            kept.append(int(token))
        return self.decode(kept)

    def chat_text(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
        """The dialogue as the template writes it, to be read; ids are made by `dialogues`, not of this text."""
        return self._template.text(messages, generation_prompt=generation_prompt)

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt for the reply to `messages`."""
        return next(self.dialogues([messages])).ids

    def dialogues(self, asked: Sequence[Sequence[Message]], *, answered: bool = False) -> Iterator[Dialogue]:
        """Ids of each dialogue: the prompt for its next reply, or (`answered`) all up to the end of its last, a reply.

        Ids are cut where a reply starts, so that a prompt has the same ids when it is asked as in the dialogue that is
        trained on. Special strings that a message contains are encoded as plain text. Else the ids are those that
        transformers' `apply_chat_template` gives, where no token reaches over the start of a reply: none does if
        newlines are isolated and the header ends with one. What a template writes behind the end token of the last
        reply is left out; LLaDA's opens another reply there, whether asked to or not.

        Raises `ValueError` where the template refuses a dialogue, or writes its last reply in another way than it
        announces it.
        """
        for first in range(0, len(asked), _AT_ONCE):
            cut = [self._template.parts(messages, answered=answered) for messages in asked[first : first + _AT_ONCE]]
            plain = self.encode_batch([text for parts in cut if not parts.marks for text in parts.texts], user=False)
            for parts in cut:
                if parts.marks:
                    encoded = [self._marked_ids(text, parts.marks) for text in parts.texts]
                else:
                    encoded = list(islice(plain, len(parts.texts)))
                yield self._joined(encoded, answered)

    def _joined(self, parts: list[list[int]], answered: bool) -> Dialogue:
        ids, *rest = parts
        replies, ends = [], self.end_ids
        for number, part in enumerate(rest, 1):
            closed = [part.index(end) + 1 for end in ends if end in part]
            if closed or number == len(rest):  # else nothing tells where the next message begins
                replies.append((len(ids), len(ids) + min(closed, default=len(part))))
            ids += part
        if answered:
            del ids[replies[-1][1] :]
        return Dialogue(ids, replies)

    def _marked_ids(self, text: str, marks: dict[str, str]) -> list[int]:
        """Ids of a part of a dialogue, with the special strings that its marks stand for as plain text."""
        ids = []
        for piece in re.split(f"([{''.join(marks)}])", text):
            ids += self.encode(marks[piece]) if piece in marks else self.encode(piece, user=False)
        return ids


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> Tokenizer:
    """A byte-level BPE with LLaDA's special strings and chat template, saved in `folder`.

    Every digit and every newline is a token of its own, as newlines are in LLaDA's: no token reaches over the end of a
    header into what is said behind it.
    """
    if vocab_size < 256 + len(SPECIAL_STRINGS):
        raise ValueError(f"vocab_size {vocab_size} is below {256 + len(SPECIAL_STRINGS)} (256 bytes and the specials)")
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d|\n"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_STRINGS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=engine,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        mask_token=MASK,
        additional_special_tokens=[HEADER_START, HEADER_END, EOT],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    tokenizer = Tokenizer(fast)
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    return tokenizer


def named_ids(name_or_path: str | Path) -> dict[str, int]:
    """The special ids (`mask_id`, `eos_id` ...) that the tokenizer beside a model names; empty without a tokenizer."""
    fast = _stored(name_or_path)
    return {} if fast is None else _ids_of(fast)


def _stored(name_or_path: str | Path) -> Any | None:
    """The tokenizer of a folder or Hub name; None where a folder holds none."""
    folder = Path(name_or_path)
    held = {name for name in ("tokenizer.json", "vocab.txt", *_PAIRS) if (folder / name).is_file()}
    if folder.is_dir() and not held & {"tokenizer.json", "vocab.txt"} and not held >= _PAIRS:
        return None
    for name in _FILES if folder.is_dir() else ():
        if (folder / name).is_file():
            document(folder / name)  # what the library says of a damaged one names no file
    if held == _PAIRS:
        return Qwen2Tokenizer.from_pretrained(str(folder))
    # An export's auto_map names code; unless told not to run it, transformers asks the terminal.
    return AutoTokenizer.from_pretrained(str(name_or_path), trust_remote_code=False)


def _in_older_words(folder: Path) -> None:
    """What transformers 5 writes otherwise; it reads these words too. Merges are "a b" where no part has a space."""
    config, engine = (json.loads((folder / name).read_text(encoding="utf-8")) for name in _FILES)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    merges = engine["model"].get("merges")
    if merges and not any(isinstance(merge, str) or " " in "".join(merge) for merge in merges):
        engine["model"]["merges"] = [" ".join(merge) for merge in merges]
    for name, values in zip(_FILES, (config, engine), strict=True):
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _ids_of(fast: Any) -> dict[str, int]:
    known = fast.get_added_vocab() | {t: fast.convert_tokens_to_ids(t) for t in fast.all_special_tokens}

    def first(strings: Sequence[str | None]) -> int | None:
        return next((known[s] for s in strings if s is not None and s in known), None)

    ids = {
        "mask_id": first([fast.mask_token, *MASK_STRINGS]),
        "eos_id": first([fast.eos_token, fast.sep_token, EOS]),
        "pad_id": first([fast.pad_token]),
        "bos_id": first([fast.bos_token, fast.cls_token]),
        "eot_id": first(EOT_STRINGS),
    }
    return {name: value for name, value in ids.items() if value is not None}


def _special_tokens(fast: Any) -> SpecialTokens | None:
    ids = _ids_of(fast)
    if not {"mask_id", "eos_id"} <= ids.keys():
        return None
    return SpecialTokens(**{"pad_id": ids["eos_id"], **ids})


def _special_strings(fast: Any, special: SpecialTokens) -> re.Pattern[str]:
    """Finds what the engine reads as special tokens, the longest first, as it does; ours are, whatever a file says."""
    ids, added = set(vars(special).values()), fast.added_tokens_decoder
    strings = [token.content for number, token in added.items() if token.special or number in ids]
    fast.backend_tokenizer.add_special_tokens(strings)  # adds none: the engine is told that all of these are special
    return re.compile("|".join(map(re.escape, sorted(strings, key=len, reverse=True))) or r"(?!)")
