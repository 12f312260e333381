"""One translator a checkpoint family: FAMILIES lists them in the order in which they are tried."""

from __future__ import annotations

from typing import Any, Protocol

from engine.checkpoints.facts import Facts
from engine.checkpoints.families import abarankab, diffusers, lucidrains, openai, tutorial, w86763777
from engine.checkpoints.types import Translation


class Family(Protocol):
    """What a translator module offers.

    NAMES: values of the family fact it answers to. NEEDS: what a file must hold, for the error message.
    """

    NAMES: tuple[str, ...]
    NEEDS: str

    def matches(self, raw: Any) -> bool:
        """Whether a file's content has this family's keys."""
        ...

    def translate(self, raw: Any, facts: Facts) -> Translation:
        """The content in our terms; raises CheckpointError where file and facts contradict each other."""
        ...


FAMILIES: tuple[Family, ...] = (openai, abarankab, w86763777, tutorial, diffusers, lucidrains)
