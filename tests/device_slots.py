"""Slots on a device of the tests."""

from __future__ import annotations

from typing import Any

from engine.sampling.graph_slots import GraphSlots


def slots_of(device: Any, backend: Any, capacity: int, **options: Any) -> GraphSlots:
    return GraphSlots(device, backend.manifest, backend, capacity, **options)
