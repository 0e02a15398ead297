"""Word problems whose answer is one number: right if the reply's final number has that value.

Commas, a dollar sign and a trailing point do not matter, and 67.0 is 67; the published reward wants equal strings.
"""

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from llada_core.verifiers.text import tagged

_NUMBER = re.compile(r"-?\$?-?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")


def verify(text: str, answer: Mapping[str, Any]) -> bool:
    """`answer["answer"]`: the number as text. The reply's is in the last answer tags, else behind ####, else last."""
    reply = tagged(text)
    if reply is None:
        reply = text.rsplit("####", 1)[-1]
    wanted, given = number(str(answer["answer"])), number(reply)
    return wanted is not None and wanted == given


def number(text: str) -> Decimal | None:
    """The value of the last number in a text, None without one."""
    found = _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "").replace("$", "")) if found else None
    except InvalidOperation:
        return None
