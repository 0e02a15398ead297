"""TeX of final answers in one spelling, and what a computer algebra system may be asked about it. Knows no task."""

import re

_LONGEST = 300
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
    if len(text) > _LONGEST or _HEAVY.search(text):
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
