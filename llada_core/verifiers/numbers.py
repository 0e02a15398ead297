"""The exact value of a number as people and models spell it; None for what is no single number.

Thousands may stand apart by commas, spaces, apostrophes, underscores or points (two groups at least); fractions, mixed
numbers and powers of ten count; TeX, currencies, units and percent signs around a number do not matter. Lists, ranges,
ratios, times, dates and expressions are none: who names two numbers has not named one. Knows no task.
"""

import re
import unicodedata
from fractions import Fraction

_LONGEST = 4000  # characters that are looked at: the last ones
_DIGITS = 60  # of one number
_MINUS = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"))
_TEX = (
    (r"\\[dtc]?frac\s*\{\s*(-?[\d.]+)\s*\}\s*\{\s*(-?[\d.]+)\s*\}", r" \1/\2 "),
    (r"\\[dtc]?frac\s*(\d)\s*(\d)", r" \1/\2 "),
    (r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|boxed|fbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    (r"\{,\}|,\\!", ","),
    (r"\\!", ""),
    (r"(?<=\d)\\[,;: ](?=\d{3})", ","),
    (r"\\times|\\cdot|\u00d7|\u22c5", "*"),
    (r"\\(?:approx|simeq|sim)\b|\u2248", "="),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|\u00b0", " "),
    (r"\\(?:left|right|quad|qquad|dots|ldots)(?![A-Za-z])|\\[,;: ]|~", " "),
    (r"\\[()\[\]]|\\(?=[$%\u00a3\u20ac#&])", " "),
)
_GROUPS = "|".join(rf"\d{{1,3}}(?:{mark}\d{{3}})+" for mark in (",", " ", "['\u2019]", "_"))
_DECIMAL = (
    rf"(?:(?:{_GROUPS})(?:\.\d+)?(?![\d,'\u2019_]\d)"  # 1,234.5
    r"|\d{1,3}(?:\.\d{3}){2,}(?:,\d+)?(?![\d.,]\d)"  # 1.234.567
    r"|\d+(?:\.\d+)?|(?<![\d.])\.\d+)"
)
_NUMBER = re.compile(
    rf"(?<![A-Za-z\d^])(?P<sign>[-+]?\s*)(?:(?P<whole>\d{{1,9}})\s+(?P<part>\d{{1,9}}\s*/\s*\d{{1,9}})"
    rf"|(?P<value>(?>{_DECIMAL}))(?:[eE](?P<e>[-+]?\d{{1,2}})(?![\d.])|(?![eE][-+]?\d))(?:\s*/\s*(?P<below>-?{_DECIMAL}))?)"
    r"(?:\s*\*\s*10\s*\^\s*\{?\s*(?P<ten>[-+]?\d{1,2})(?!\d)\s*\}?)?(?P<power>\s*\^\s*\{?\s*-?\w+\}?)?"
    r"(?:\s?(?P<scale>thousand|million|billion|trillion)s?\b|(?P<k>[kK])\b(?!\s*[A-Za-z]))?"
)
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
# Between two numbers that are told together: "5, 10", "5 or 10", "3 hours and 30 minutes", "10-20", "12:30", "4 x 5".
_JOINED = re.compile(
    r"[\s$%\u00a2]*(?:[A-Za-z]+\.?\s*)?(?:,|;|:|/|\+|-|\*|\^|&|\||\bor\b|\band\b|\bto\b|\bthrough\b|\bx\b|\boder\b)+"
    r"(?:\s*(?:or|and)\b)?[\s$\u00a3\u20ac]*(?:[A-Za-z]+\s*=\s*)?-?\s*",
    re.IGNORECASE,
)


def number(text: str) -> Fraction | None:
    """The value of the number that a text ends in; None without one, or where it ends in several told together.

    Behind the last equals sign, if a number stands there.
    """
    text = plain(text)
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    last = found[-1]
    if len(found) > 1:
        between = text[found[-2].end() : last.end("sign")]
        if between == "." or _JOINED.fullmatch(between):
            return None
    return _value(last)


def single(text: str) -> Fraction | None:
    """The value of a text that is a number and nothing else but signs, units and currencies; None for all others."""
    text = plain(text)
    found = list(_NUMBER.finditer(text))
    if len(found) != 1 or not re.fullmatch(r"[\s$\u00a3\u20ac+{]*|[A-Z]{2,3}\s*\$?", text[: found[0].start()]):
        return None
    return _value(found[0]) if re.fullmatch(r"[\s.%$\u00a2\u20ac}]*", text[found[0].end() :]) else None


def plain(text: str) -> str:
    """A text with plain digits, signs and spaces, without TeX around numbers and powers of units."""
    text = "".join(_plain_character(c) for c in text[-_LONGEST:].translate(_MINUS))
    for pattern, replacement in _TEX:
        text = re.sub(pattern, replacement, text)
    text = re.sub(r"\*\*|`|(?<!\d)_|_(?!\d)", " ", text)
    text = re.sub(r"(?<=[A-Za-z}])\s*\^\s*\{?\s*-?\d+\s*\}?", "", text)  # cm^3
    text = re.sub(r"(?<=[A-Za-z])\.(?=\d)|(?<=\b[A-Z]{3})(?=\d)|(?<=\bRs)(?=\d)", ". ", text)  # No.5, USD18
    text = re.sub(
        r"([-+]?)\s*(?:US|CA|AU|[AR])?[$\u00a3\u20ac\u00a5\u20b9]\s*(-?)\s*(?=[\d.])", r" \1\2", text
    )  # -$5, $-5
    return re.sub(r"(?<=[\d)])\s*\$", " ", text)


def _plain_character(character: str) -> str:
    kind = unicodedata.decomposition(character)
    if kind.startswith("<super>"):
        return "^" + unicodedata.normalize("NFKC", character)
    if kind.startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", character).replace("\u2044", "/")
    if unicodedata.category(character) == "Cf":  # marks without a width
        return ""
    return unicodedata.normalize("NFKC", character)


def _value(found: re.Match[str]) -> Fraction | None:
    if found["power"] or len(found[0]) > _DIGITS:
        return None
    try:
        if found["whole"]:
            size = int(found["whole"]) + Fraction(re.sub(r"\s", "", found["part"]))
        else:
            size = _decimal(found["value"]) * Fraction(10) ** int(found["e"] or 0)
            if found["below"]:
                size /= _decimal(found["below"])
    except ZeroDivisionError:
        return None
    size *= Fraction(10) ** (int(found["ten"] or 0) + _SCALES.get(found["scale"] or "", 3 if found["k"] else 0))
    return -size if found["sign"].strip() == "-" else size


def _decimal(text: str) -> Fraction:
    if text.count(".") > 1:  # points between thousands
        text = text.replace(".", "").replace(",", ".")
    return Fraction(re.sub(r"[,\s'\u2019_]", "", text))
