"""Reading diffusers' JSON configs: typed values, the library's defaults, errors that name key and value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from engine.errors import CheckpointError


def is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """A whole number from 1 up."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_optional_count(value: Any) -> bool:
    return value is None or is_count(value)


class Options:
    """One JSON object; file: its name, for messages."""

    def __init__(self, raw: Mapping[str, Any], file: str) -> None:
        self._raw, self._file, self._known = raw, file, set[str]()

    def take(self, key: str, default: Any, fits: Callable[[Any], bool], expected: str) -> Any:
        """The value of a key, or the library's default; raises CheckpointError for a value that does not fit."""
        self._known.add(key)
        value = self._raw.get(key, default)
        if not fits(value):
            raise self.wrong(key, expected)
        return value

    def choice(self, key: str, default: str | None, choices: Iterable[str | None]) -> Any:
        """One of a few values."""
        names = tuple(choices)
        shown = ", ".join("null" if name is None else name for name in names)
        return self.take(key, default, lambda value: value in names, f"one of {shown}")

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.take(key, default, is_bool, "true or false"))

    def number(self, key: str, default: float) -> float:
        return float(self.take(key, default, lambda v: is_number(v) and v > 0, "a number above 0"))

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self._raw.get(key) is not None

    def wrong(self, key: str, expected: str) -> CheckpointError:
        """The error for a key's value."""
        return CheckpointError(f"{self._file}: {key} is {self._raw.get(key)!r}; expected {expected}")

    def check_all_known(self, ignored: Iterable[str]) -> None:
        """Raises CheckpointError for a key that was not taken and is neither null nor private nor in `ignored`."""
        known = self._known | set(ignored)
        shown = ", ".join(sorted(key for key in self._known if not key.startswith("_")))
        for key, value in self._raw.items():
            if key not in known and not key.startswith("_") and value not in (None, False):
                raise CheckpointError(
                    f"{self._file}: unknown key {key} = {value!r}; known: {shown}. "
                    "Remove it from the file if the network does not depend on it"
                )
