"""Where in a reply the answer stands. Knows no task."""

import re

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def tagged(text: str) -> str | None:
    """What the last `<answer>...</answer>` holds, stripped; None without such tags."""
    found = _TAGGED.findall(text)
    return found[-1].strip() if found else None


def final_answer(text: str) -> str:
    """The last tagged answer, else the whole reply; stripped."""
    answer = tagged(text)
    return text.strip() if answer is None else answer
