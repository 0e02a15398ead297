"""Tokenizer, chat template and special ids as one object, and the training of a new one.

Knows text and ids; does not know models. `Tokenizer.dialogues` is the one place where a dialogue becomes ids, whether
it is trained on, asked or scored. A special string inside a user's text is text, not a command. Threads may share one
tokenizer.
"""

import json
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llada_core.dialogue import ChatTemplate, Message
from llada_core.families import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    EOT,
    EOT_STRINGS,
    HEADER_END,
    HEADER_START,
    MASK,
    MASK_STRINGS,
    SPECIAL_STRINGS,
    SpecialTokens,
)
from llada_core.files import document

_FILES = ("tokenizer_config.json", "tokenizer.json")
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
    if folder.is_dir() and not (folder / "tokenizer.json").is_file() and not (folder / "vocab.txt").is_file():
        return None
    for name in _FILES if folder.is_dir() else ():
        if (folder / name).is_file():
            document(folder / name)  # what the library says of a damaged one names no file
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
