"""Where an answer stands in a reply, and how numbers and TeX may be spelled."""

import re
import unicodedata
from fractions import Fraction

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def tagged(text: str) -> str | None:
    """What the last `<answer>...</answer>` holds, stripped; None without such tags."""
    found = _TAGGED.findall(text)
    return found[-1].strip() if found else None


def final_answer(text: str) -> str:
    """The last tagged answer, else the whole reply; stripped."""
    answer = tagged(text)
    return text.strip() if answer is None else answer


# Thousands may stand apart by commas, spaces, apostrophes, underscores or points (two groups at least); fractions, mixed
# numbers and powers of ten count; TeX, currencies, units and percent signs around a number do not matter. Lists, ranges,
# ratios, times, dates and expressions are none: who names two numbers has not named one.
_LONGEST_NUMBER = 4000  # characters that are looked at: the last ones
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
    text = "".join(_plain_character(c) for c in text[-_LONGEST_NUMBER:].translate(_MINUS))
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


_LONGEST_TEX = 300
_UNICODE = str.maketrans({
    "\u2212": "-", "\u2013": "-", "\u00d7": "\\times ", "\u00b7": "\\cdot ", "\u22c5": "\\cdot ", "\u00f7": "/", "\u03c0": "\\pi ",
    "\u221e": "\\infty ", "\u2264": "\\le ", "\u2265": "\\ge ", "\u2260": "\\ne ", "\u222a": "\\cup ", "\u2229": "\\cap ",
    "\u00b1": "\\pm ", "\u00b0": "^\\circ ", "\u03b8": "\\theta ", "\u2208": "\\in ", "\u2205": "\\emptyset ", "\u00a0": " ",
    "\u202f": " ", "\u2009": " ", "\u200b": "", "\u00b2": "^2", "\u00b3": "^3",
    "\u00bd": "\\frac{1}{2}", "\u00bc": "\\frac{1}{4}", "\u00be": "\\frac{3}{4}", "\u2153": "\\frac{1}{3}", "\u2154": "\\frac{2}{3}",
})  # fmt: skip
_WORDS = r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mbox|operatorname)"
_BARE_UNITS = (
    r"(?:[ckmn]?m|[km]?g|m?l|ft|in|mi|mph|lbs?|hours?|minutes?|seconds?|days?|weeks?|months?|years?|degrees?|dollars?|cents?"
    r"|percent|units?|inch(?:es)?|feet|foot|miles?|met(?:er|re)s?|square|cubic|points?|ways?|people|students?)"
)
_REPLACED = (
    (r"\\[()\[\]]|(?<!\\)\$|\*\*", ""),
    (r"\\f?box(?:ed)?\s*\{([^{}]*)\}", r"\1"),
    (r"\\[tdc]frac", r"\\frac"),
    (r"\\frac\s+(\w)\s+(\w)", r"\\frac{\1}{\2}"),
    (r"\u221a\s*(\w+)", r"\\sqrt{\1}"),
    (r"\{,\}(?=\d{3}(?!\d))|,\\!|\\!,", ","),
    (r"(?<=\d)\\[,;: !](?=\d{3}(?!\d))", ","),
    (r"\\!", ""),
    (r"\\[,;: ]|~|\\q?quad(?![A-Za-z])", " "),
    (r"\\(?:left|right|displaystyle|bigl?|bigr|Bigl?|Bigr)(?![A-Za-z])", ""),
    (r"\^\s*\{?\s*\\circ\s*\}?(?:\s*[CF]\b)?|\\degree", ""),
    (r"\\\$|\\?%|\\(?:pounds|euro)(?![A-Za-z])|[\u00a3\u20ac]", ""),
    (rf"{_WORDS}\s*\{{\s*,?\s*(?:and|or)\s*\}}", ","),
    (r"\s(?:and|or)\s", ","),
    (
        rf"(?<=[\d)}}])\s*{_WORDS}\s*\{{(?!\s*[ieap]\.?(?:\.?m\.?)?\s*\}}|\s*[AP]\.?M)[^{{}}]*\}}(?:\s*\^\s*\{{?-?\d\}}?)?",
        "",
    ),
    (rf"(?<=[\d)}}])\s*(?:{_BARE_UNITS}\b\s*)+(?:\^\s*\{{?-?\d\}}?)?$", ""),
    (rf"^{_WORDS}\s*\{{\s*\(?([A-Za-z])\)?\s*\}}$|^\(([A-Z])\)$", r"\1\2"),
    (r"^[A-Za-z]\s*\\in(?![A-Za-z])\s*", ""),
    (rf"{_WORDS}\s*\{{\s+", r"\\text{"),
    (r"_\{(\w)\}", r"_\1"),
    (r"\^\{(\w)\}", r"^\1"),
    (r"(?<=\d) (?=\d{3}(?!\d))", ","),
    (r"(?<=\d)\s+(?=\d)", " ; "),
    (r"\s+", " "),
)
# What may take long, or has no value of its own.
_HEAVY = re.compile(r"!|\\(?:binom|sum|prod|int|lim|gamma|zeta|ldots|dots|cdots|pmod|bmod|mod)(?![A-Za-z])")
_EXPONENT = re.compile(r"\^\s*(\{[^{}]*\}|-?\w)")


def notation(expression: str) -> str:
    """The expression without spacing, sizes, units and signs around it, its symbols in TeX; words in lower case."""
    text = expression.translate(_UNICODE).strip()
    for pattern, replacement in _REPLACED:
        text = re.sub(pattern, replacement, text)
    text = text.strip().rstrip(".,").strip()
    words = re.fullmatch(rf"{_WORDS}\s*\{{([^{{}}]*)\}}", text)
    if words or re.fullmatch(r"[A-Za-z]{2}[A-Za-z ,.'-]*", text):
        text = f"\\text{{{(words[1] if words else text).strip().casefold()}}}"
    return re.sub(r"^\+(?=[\d.])", "", text)


def box_kind(text: str) -> str:
    """The brackets around a list or interval: a pair is no set, and a closed end no open one."""
    if "," not in text:
        return ""
    first, last = re.match(r"\\\{|[(\[]|", text), re.search(r"(\\\}|[)\]]|)$", text)
    brackets = (first[0] if first else "") + (last[0] if last else "")
    return "" if brackets in ("\\{\\}", "()") and re.search(r"\\c[ua]p", text) else brackets.replace("\\{\\}", "")


def readable(text: str) -> bool:
    """Whether the expression is one that math-verify reads as it is meant, and whose value does not take long."""
    if len(text) > _LONGEST_TEX or _HEAVY.search(text):
        return False
    if re.search(r"\\text|:|;|\d_|[A-Z]{2}", text):  # words, clock times, other bases, names of points
        return False
    size = 1
    for exponent in _EXPONENT.findall(text):
        inner = exponent.strip("{}")
        if "^" in inner or re.search(r"[*(]|\\cdot|\\times", inner):
            return False
        for number in re.findall(r"\d+", inner):
            size *= max(1, int(number[:6]))
    if "^" in _EXPONENT.sub("", text):  # an exponent of another form
        return False
    return size <= (100 if re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text)) else 10_000)
