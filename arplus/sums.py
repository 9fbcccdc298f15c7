"""Base class for counts that workers collect separately and add up."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Self

SAME = {"the same in all parts": True}
"""A field's metadata: it says what is counted, and is not added."""


class Sums:
    """Base of a dataclass whose fields are sums: numbers, arrays, counters, sets, lists of parts, or sums again."""

    def __add__(self, other: Self) -> Self:
        """Both together, field by field; what both have in common (:data:`SAME`) must be the same."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        found |= {name: _together(mine, theirs) for name, mine, theirs in self._beside(other)}
        return type(self)(**found)

    def __iadd__(self, other: Self) -> Self:
        """The same in place, where counters grow: to copy one of a million words for each part takes long."""
        for name, mine, theirs in self._beside(other):
            if isinstance(mine, Counter):
                mine.update(theirs)
            else:
                setattr(self, name, _together(mine, theirs))
        return self

    def _beside(self, other: Self) -> Iterator[tuple[str, Any, Any]]:
        """The name and both values of each field that is added."""
        for f in fields(self):  # type: ignore[arg-type]
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            assert f.metadata != SAME or mine == theirs, f.name
            if f.metadata != SAME:
                yield f.name, mine, theirs


def _together(mine: Any, theirs: Any) -> Any:
    if isinstance(mine, set):
        return mine | theirs
    if isinstance(mine, dict) and not isinstance(mine, Counter):
        return {key: _together(mine[key], theirs[key]) for key in mine}
    return mine + theirs
