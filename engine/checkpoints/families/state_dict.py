"""The tensors of a file as a translator takes them: each once, none left over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from engine.errors import CheckpointError


class StateDict:
    """A state dict that remembers which tensors were taken and names what is missing or left over."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._tensors = {str(key): value for key, value in raw.items() if isinstance(value, Tensor)}
        self._used: set[str] = set()

    def has(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self._tensors)

    def keys(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._get(key).shape)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        return ((key, tuple(value.shape)) for key, value in self._tensors.items())

    def take(self, key: str) -> Tensor:
        """The tensor in float32; raises CheckpointError naming a missing key."""
        self._used.add(key)
        return self._get(key).detach().float().contiguous()

    def check_all_used(self) -> None:
        """Raises CheckpointError if tensors were left over: the network is not the one that was inferred."""
        if left := sorted(set(self._tensors) - self._used):
            raise CheckpointError(
                f"{len(left)} tensors do not belong to the network inferred from the file: {', '.join(left[:4])}"
                f"{', ...' if len(left) > 4 else ''}; the file may be of a modified version of the project"
            )

    def _get(self, key: str) -> Tensor:
        try:
            return self._tensors[key]
        except KeyError:
            raise CheckpointError(f"the file lacks {key}; it is incomplete or of a modified version") from None


def submodules(state: StateDict, prefix: str) -> list[str]:
    """Prefixes "prefix.0", "prefix.1", ... that hold tensors, in numerical order."""
    parts = {key[len(prefix) + 1 :].split(".")[0] for key in state.keys() if key.startswith(prefix + ".")}  # noqa: SIM118
    return [f"{prefix}.{number}" for number in sorted(int(part) for part in parts if part.isdecimal())]
