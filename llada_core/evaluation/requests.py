"""What lm-eval asks for, as ids and sampler settings: stop strings, `gen_kwargs`, lengths, batches of similar length."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from llada_core.evaluation.params import SAMPLER_FIELDS, BenchmarkSettings
from llada_core.sampling.params import SamplingParams
from llada_core.settings import ConfigError, nearest
from llada_core.tokenizer import Message, SpecialTokens, Tokenizer

log = logging.getLogger(__name__)
DEFAULT_LENGTH = 256
CHUNK = 4096  # texts encoded at once
# Names that other LLaDA evaluators use for the same things.
OTHER_NAMES = {
    "block_size": "block_length",
    "gen_length": "max_new_tokens",
    "length": "max_new_tokens",
    "cfg": "cfg_scale",
    "suppress_tokens": "forbid_tokens",
    "begin_suppress_tokens": "defer_tokens",
}
CACHES = {"true": "prefix", "false": "none"}  # Fast-dLLM's switch
TOKEN_LISTS = ("forbid_tokens", "defer_tokens", "cfg_keep_tokens")
_OF_LM_EVAL = ("until", "do_sample", "infill", "max_gen_toks", "temperature")


class ChatText(str):
    """A rendered dialogue that remembers what was said, and what the reply begins with.

    lm-eval carries prompts about as texts. Ids are made of the messages: in the text, a special string that somebody
    wrote looks like the template's own, and where the reply starts is not to be seen.
    """

    messages: tuple[Message, ...]
    begun: str

    def __new__(cls, text: str, messages: Sequence[Message] = (), begun: str = "") -> Self:
        chat = super().__new__(cls, text)
        chat.messages, chat.begun = tuple(messages), begun
        return chat

    def __add__(self, more: str) -> "ChatText":
        """What is put behind the text belongs to the reply."""
        return ChatText(str(self) + more, self.messages, self.begun + more)


@dataclass(frozen=True)
class GenerationRequest:
    """One answer to generate: `prompt` ids, settings, stop strings; `blanks` masks before `suffix` when infilling.

    Of equal requests each is a `copy` of its own, from 0.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    until: tuple[str, ...] = ()
    suffix: tuple[int, ...] = ()
    blanks: int = 0
    copy: int = 0

    @property
    def length(self) -> int:
        """Tokens on the canvas."""
        return len(self.prompt) + (self.blanks or self.params.max_new_tokens) + len(self.suffix)


def renamed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by our names: `use_cache` (none, prefix, dual, or true with `dual_cache`) is `cache`."""
    values = {OTHER_NAMES.get(key, key): value for key, value in given.items()}
    if "use_cache" in values:
        cache = str(values.pop("use_cache")).lower()
        values["cache"] = CACHES.get(cache, cache)
    if str(values.pop("dual_cache", "false")).lower() == "true" and values.get("cache", "prefix") != "none":
        values["cache"] = "dual"
    return values


def asked_for(given: Mapping[str, Any]) -> dict[str, Any]:
    """A task's or user's `gen_kwargs` by our names; raises `ConfigError` that names an unknown one and the nearest."""
    asked, known = renamed(given), [*SAMPLER_FIELDS, *_OF_LM_EVAL]
    for key in asked:
        if key not in known:
            raise ConfigError(f"gen_kwargs: unknown setting {key!r}{nearest(key, known)}")
    return asked | {name: token_list(asked[name]) for name in TOKEN_LISTS if name in asked}


def sampling_params(
    settings: BenchmarkSettings, special: SpecialTokens, asked: Mapping[str, Any] | None = None
) -> SamplingParams:
    """The sampler settings of a request.

    `settings` are the recipe's or the model's own; a task's or user's `gen_kwargs` (`asked`) go over them where they
    use the sampler's names. `max_gen_toks` counts only if no length is set, `temperature` only if `do_sample` is not
    false. A length given alone takes blocks and steps along. Raises `ConfigError` for unknown names or bad values.
    """
    values: dict[str, Any] = {k: v for k, v in settings.sampling.items() if v is not None}
    asked = asked_for(asked or {})
    over = {k: v for k, v in asked.items() if k in SAMPLER_FIELDS and k != "temperature"}
    if "max_new_tokens" not in values:
        over.setdefault("max_new_tokens", asked.get("max_gen_toks", DEFAULT_LENGTH))
    if "temperature" in asked and asked.get("do_sample", True):
        over["temperature"] = asked["temperature"]
    eos = values.pop("eos", "none")
    if eos == "forbid":
        over["forbid_tokens"] = (special.eos_id,)
    if eos == "defer":
        over["defer_tokens"] = tuple(sorted(special.end_ids))
    length = over.pop("max_new_tokens", values.get("max_new_tokens"))
    own = {"max_new_tokens": length} | values
    own = {"block_length": own["max_new_tokens"], "steps": own["max_new_tokens"]} | own
    sizes = {name: over.pop(name) for name in ("block_length", "steps") if name in over}
    return dataclasses.replace(SamplingParams(**own | over).at_length(length), **sizes)


def token_list(value: Any) -> tuple[int, ...]:
    """Token ids as lm-eval's command line gives them: `[1;2]`, a list, or one number."""
    if isinstance(value, str):
        return tuple(int(part) for part in value.strip("[]() ").replace(",", ";").split(";") if part.strip())
    return (value,) if isinstance(value, int) else tuple(int(v) for v in value)


def wanted(
    requests: Sequence[tuple[str, Mapping[str, Any]]], settings: BenchmarkSettings, tokenizer: Tokenizer, longest: int
) -> list[GenerationRequest]:
    """What is behind rendered prompts and their `gen_kwargs`.

    A prompt that leaves no room for its answer within `longest` tokens loses its beginning; `ConfigError` if there is
    no room for any prompt.
    """
    plain = [text for text, asked in requests if not asked.get("infill")]
    encoded = prompt_ids(plain, tokenizer)
    found, shortened = [], 0
    for text, asked in requests:
        params = sampling_params(settings, tokenizer.special, asked)
        until = asked.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        if asked.get("infill"):
            found.append(_template(text.split(asked["infill"]), params, until, tokenizer))
            continue
        room = longest - params.max_new_tokens
        if room < 1:
            raise ConfigError(f"max_new_tokens {params.max_new_tokens} leaves no room for a prompt in {longest} tokens")
        prompt = next(encoded)
        shortened += len(prompt) > room
        found.append(GenerationRequest(tuple(prompt[-room:]), params, until))
    if shortened:
        log.warning("%d prompts lose their beginning: the model takes %d tokens with the answer", shortened, longest)
    seen: Counter[tuple[int, ...]] = Counter()
    return [dataclasses.replace(each, copy=_counted(seen, each.prompt + each.suffix)) for each in found]


def _counted(seen: Counter[tuple[int, ...]], ids: tuple[int, ...]) -> int:
    """How often these ids came before."""
    seen[ids] += 1
    return seen[ids] - 1


def prompt_ids(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Ids of what is to be continued: of dialogues as everywhere, of other texts with special strings as tokens."""
    chats = [text for text in texts if isinstance(text, ChatText)]
    asked, begun = tokenizer.dialogues([c.messages for c in chats]), tokenizer.encode_batch([c.begun for c in chats])
    plain = tokenizer.encode_batch([text for text in texts if not isinstance(text, ChatText)], user=False)
    for text in texts:
        yield next(asked).ids + next(begun) if isinstance(text, ChatText) else next(plain)


def _template(
    parts: list[str], params: SamplingParams, until: tuple[str, ...], tokenizer: Tokenizer
) -> GenerationRequest:
    before, reference, after = tokenizer.encode_batch(parts, user=False)
    return GenerationRequest(tuple(before), params, until, tuple(after), max(1, len(reference)))


def pairs(texts: Sequence[tuple[str, str]], tokenizer: Tokenizer, prefix: int) -> list[tuple[list[int], list[int]]]:
    """Ids of contexts and continuations.

    Spaces that end a context open its continuation, both are encoded as one text, and the context's own length says
    where it ends (lm-eval, LLaDA). Of a dialogue, that holds for the reply alone: its prompt stays as it is, and ends
    where the reply starts. An empty context is the token `prefix`. A continuation that the whole has no token of its
    own for (its letters join the last of the context) is encoded apart, and one without any token, such as an empty
    choice, is the end token: without tokens it would be certain, and win.
    """
    chats = {id(context): context for context, _ in texts if isinstance(context, ChatText)}
    asked = tokenizer.dialogues([chat.messages for chat in chats.values()])
    prompts = {key: dialogue.ids for key, dialogue in zip(chats, asked, strict=True)}
    replies = [(c.begun if isinstance(c, ChatText) else c, continuation) for c, continuation in texts]
    kinds = [isinstance(c, ChatText) for c, _ in texts]
    split = {
        user: _split([reply for reply, kind in zip(replies, kinds, strict=True) if kind is user], tokenizer, user=user)
        for user in (False, True)
    }
    joined: dict[tuple[int, str], list[int]] = {}  # the options of a question share their context
    found = []
    for (context, _), user in zip(texts, kinds, strict=True):
        before, ids, continuation = next(split[user])
        if user:
            prompt = prompts[id(context)]
            ids = joined.setdefault((id(context), before), prompt + ids) if ids else prompt
        found.append((ids or [prefix], continuation))
    return found


def _split(
    texts: Sequence[tuple[str, str]], tokenizer: Tokenizer, *, user: bool
) -> Iterator[tuple[str, list[int], list[int]]]:
    moved = [_with_spaces(context, continuation) for context, continuation in texts]
    contexts = list(dict.fromkeys(context for context, _ in moved))
    ids = dict(zip(contexts, tokenizer.encode_batch(contexts, user=user), strict=True))
    for start in range(0, len(moved), CHUNK):
        part = moved[start : start + CHUNK]
        wholes = tokenizer.encode_batch([context + continuation for context, continuation in part], user=user)
        for (context, continuation), whole in zip(part, wholes, strict=True):
            own = whole[len(ids[context]) :] or tokenizer.encode(continuation, user=user)
            yield context, ids[context], own or [tokenizer.special.eos_id]


def _with_spaces(context: str, continuation: str) -> tuple[str, str]:
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation


def cut(text: str, until: Sequence[str]) -> str:
    """`text` up to the first stop string."""
    for stop in until:
        if stop:
            text = text.split(stop, 1)[0]
    return text


def batches(lengths: Sequence[int], groups: Sequence[Any], size: int) -> list[list[int]]:
    """Numbers of requests in batches of one group and similar length, the longest first, ties in their given order."""
    order: dict[Any, list[int]] = {}
    for number, group in enumerate(groups):
        order.setdefault(group, []).append(number)
    result = []
    for numbers in order.values():
        numbers.sort(key=lambda i: -lengths[i])
        result += [numbers[i : i + size] for i in range(0, len(numbers), size)]
    return result
