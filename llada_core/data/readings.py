"""How the rows of sources were read: as what shape, and which cannot be used and why; collected, summed up, judged.

Knows no files and no stages.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llada_core.data.sources import DataError, Unusable

PLAIN = ""  # the shape of a row that is as its stage needs it
ALWAYS_BEARABLE = 10  # rows of a source: in a small one they would be a large share


@dataclass
class Reading:
    """Some rows of one source: how many of which shape, and the unusable ones by their number."""

    name: str
    rows: int
    shapes: Counter[str] = field(default_factory=Counter)
    unusable: dict[int, Unusable] = field(default_factory=dict)


class Readings:
    """All rows of all sources of a part."""

    def __init__(self) -> None:
        self._rows: Counter[str] = Counter()
        self._shapes: dict[str, Counter[str]] = {}
        self._reasons: dict[str, Counter[str]] = {}
        self._first: dict[tuple[str, str], str] = {}

    def add(self, reading: Reading | None) -> None:
        """Counts some more rows; None: generated ones, of which nothing is to be told."""
        if reading is None:
            return
        name = reading.name
        self._rows[name] += reading.rows
        self._shapes.setdefault(name, Counter()).update(reading.shapes)
        self._reasons.setdefault(name, Counter()).update(each.reason for each in reading.unusable.values())
        for _, each in sorted(reading.unusable.items()):
            self._first.setdefault((name, each.reason), each.told)

    def card(self) -> dict[str, Any]:
        """Source -> rows, `as` (rows by shape), `unusable` (by reason); without sources whose rows are all plain."""
        found = {}
        for name, rows in self._rows.items():
            shapes = {shape: count for shape, count in sorted(self._shapes[name].items()) if shape != PLAIN}
            reasons = {
                reason: {"rows": count, "first": self._first[name, reason]}
                for reason, count in sorted(self._reasons[name].items())
            }
            if shapes or reasons:
                found[name] = {"rows": rows, "as": shapes, "unusable": reasons}
        return found

    def reasons(self) -> Counter[str]:
        """Unusable rows of all sources by reason."""
        return sum(self._reasons.values(), Counter())

    def first(self) -> str:
        """Where the first of each kind stands, as the end of a sentence."""
        return "".join(f"; {name}, {told}" for (name, _), told in list(self._first.items())[:3])


def lines_of(card: Mapping[str, Any]) -> Iterator[str]:
    """What a card's `read` says, in a line for each source and matter."""
    for name, read in card.items():
        if read["as"]:
            shapes = "; ".join(f"{shape}: {count:,}" for shape, count in read["as"].items())
            yield f"{name}: {read['rows']:,} rows, recognised as {shapes}"
        if read["unusable"]:
            yield f"{name}: {_unusable(read)}, left out: {_told(read['unusable'])}"


def require_usable(stage: str, card: Mapping[str, Any], share: float, *, strict: bool) -> None:
    """Raises `DataError` where a source has more unusable rows than `share` of all (and than ten), or, strict, any."""
    for name, read in card.items():
        count, rows = sum(each["rows"] for each in read["unusable"].values()), read["rows"]
        if not count or (not strict and count < rows and count <= max(ALWAYS_BEARABLE, share * rows)):
            continue
        if strict:
            way = "strict: true refuses any; to go on without them, give the same command -S data.strict=false"
        elif count == rows:
            way = "none is left of this source; mend it, or take it out of the sources"
        else:
            needed = min(1.0, -(-count * 1000 // rows) / 1000)
            allowed = f"max_unusable allows {share:g} of a source"
            way = f"{allowed}; to go on without them, give the same command -S data.max_unusable={needed:g}"
        raise DataError(f"data.{stage}: {name}: {_unusable(read)} ({_told(read['unusable'])}); {way}")


def _unusable(read: Mapping[str, Any]) -> str:
    count = sum(each["rows"] for each in read["unusable"].values())
    return f"{count:,} of {read['rows']:,} rows cannot be used"


def _told(reasons: Mapping[str, Any]) -> str:
    most = sorted(reasons.items(), key=lambda item: -item[1]["rows"])
    named = [f"{each['rows']:,} {reason}, first {each['first']}" for reason, each in most[:5]]
    return "; ".join(named) + (f"; and {len(most) - 5} other reasons" if len(most) > 5 else "")
