"""JSON files of a known type: read, found, written, or replaced as they were read."""

import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from arplus import claims, storage
from arplus.config import from_dict, to_dict
from arplus.errors import UsageError

T = TypeVar("T")


class Document(Generic[T]):
    """A JSON file that holds a dataclass; unknown keys are refused by name.

    A ``patient`` one waits for storage that is away (:func:`arplus.storage.with_retries`).
    """

    def __init__(self, uri: str, kind: type[T], *, patient: bool = True) -> None:
        self.uri = uri
        self.name = uri.rpartition("/")[2]
        self._kind = kind
        self._patient = patient

    def exists(self) -> bool:
        """Whether the file is there."""
        return self._reach(storage.exists)

    def read(self) -> T:
        """Its content. Raises :class:`UsageError` where it is missing or broken, or holds something else."""
        return self._parse(self._reach(storage.read_bytes))

    def find(self) -> T | None:
        """Its content; None where there is no such file."""
        found = self._reach(storage.find_bytes)
        return None if found is None else self._parse(found)

    def write(self, value: T) -> None:
        """Writes it whole or not at all."""
        self._reach(storage.write_bytes, self.text(value).encode())

    def update(self, change: Callable[[T | None], T]) -> T:
        """Replaces the content by what ``change`` makes of it, and gives that; see :func:`arplus.claims.update`.

        No write of another process is lost, but in a store without conditional writes: there the last one wins.
        """
        new: list[T] = []

        def replace(data: bytes | None) -> bytes:
            new.append(change(None if data is None else self._parse(data)))
            return self.text(new[-1]).encode()

        self._reach(claims.update, replace, last_wins=True)
        return new[-1]

    def text(self, value: T) -> str:
        """The text of a file with this content."""
        return storage.as_json(self._to_values(value))

    def _reach(self, work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        reach = storage.patient(work, self.uri) if self._patient else functools.partial(work, self.uri)
        return reach(*arguments, **named)

    def _parse(self, data: bytes) -> T:
        values = storage.parse_json(data, self.uri)
        if not isinstance(values, dict):
            raise UsageError(f"{self.uri}: holds {values!r}, not the names and values of {self._kind.__name__}")
        return self._from_values(values)

    def _from_values(self, values: dict[str, Any]) -> T:
        return from_dict(self._kind, values, source=self.uri)

    def _to_values(self, value: T) -> dict[str, Any]:
        return to_dict(value)
