"""How many of torch's threads a piece of work gets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(count: int | None) -> Iterator[int]:
    """Run the block on so many of torch's CPU threads, None for as many as before; gives how many those were."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield before
    finally:
        torch.set_num_threads(before)
