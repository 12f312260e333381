"""Configs, diffusion processes and manifests as JSON values, and back with every type checked.

A dataclass becomes an object of its fields, an enum its value, a tuple or an array a list. A block has one entry more,
"type": its name in engine.networks.blocks.BLOCK_TYPES. A field that is None where None is its default is left out;
every other field is written and must be there to be read. Floats come back bit by bit, and none may be NaN or infinite,
which JSON has no numbers for.
"""

from __future__ import annotations

import dataclasses
import math
from enum import Enum
from typing import Any, TypeVar, get_args, get_origin

import msgspec
import numpy as np

from engine.errors import ConfigError
from engine.networks.blocks import BLOCK_TYPES, Block

T = TypeVar("T")


def encode(value: object) -> Any:
    """The JSON form of a value: objects are dicts, arrays lists. Raises ConfigError for a number that is not finite."""
    return _encode(value, "$")


def decode(data: object, cls: type[T]) -> T:
    """The value of a class whose JSON form this is.

    Raises ConfigError that names the field, as $.networks.unet.config.blocks[3], where one is missing, unknown, of
    another type or not finite, and where the values contradict each other.
    """
    try:
        value = msgspec.convert(data, cls, dec_hook=_decode_special)
    except msgspec.ValidationError as error:
        raise ConfigError(f"this is no {cls.__name__}: {error}") from error
    _compare(data, encode(value), "$", cls)
    return value


def _encode(value: object, where: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: (getattr(value, f.name), f.default) for f in dataclasses.fields(value)}
        kept = {name: each for name, (each, default) in fields.items() if each is not None or default is not None}
        data = {name: _encode(each, f"{where}.{name}") for name, each in kept.items()}
        return {"type": _name_of(value)} | data if isinstance(value, Block) else data
    if isinstance(value, dict):
        return {name: _encode(each, f"{where}.{name}") for name, each in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_encode(each, f"{where}[{index}]") for index, each in enumerate(value)]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} is {value}; a finite number is needed here")
    return value


def _name_of(block: Block) -> str:
    for name, cls in BLOCK_TYPES.items():
        if cls is type(block):
            return name
    raise ConfigError(f"{type(block).__name__} is not named in engine.networks.blocks.BLOCK_TYPES; add it there")


def _decode_special(cls: Any, data: Any) -> Any:
    """A block or an array, the two that msgspec does not know; it adds the place to what is raised here."""
    if cls is Block:
        return _decode_block(data)
    if get_origin(cls) is np.ndarray:
        scalar = get_args(get_args(cls)[1])[0]
        kind = int if issubclass(scalar, np.integer) else float
        return np.array(_convert(data, list[kind], "array"), dtype=scalar)  # type: ignore[valid-type]
    raise NotImplementedError(f"{cls} has no JSON form")


def _decode_block(data: Any) -> Block:
    name = data.get("type") if isinstance(data, dict) else None
    if not isinstance(name, str) or name not in BLOCK_TYPES:
        raise ValueError(f"unknown block type {name!r}; known: {', '.join(BLOCK_TYPES)}")
    fields = {field: value for field, value in data.items() if field != "type"}
    return _convert(fields, BLOCK_TYPES[name], f"block {name!r}")


def _convert(data: Any, cls: type[T], what: str) -> T:
    try:
        return msgspec.convert(data, cls, dec_hook=_decode_special)
    except msgspec.ValidationError as error:
        # msgspec adds the place to any other ValueError than its own.
        raise ValueError(f"{what}: {error}") from error


def _compare(data: Any, written: Any, where: str, cls: type) -> None:
    """Raise ConfigError unless both have the same fields; msgspec ignores unknown ones and fills in defaults."""
    if isinstance(written, dict):
        unknown = [name for name, value in data.items() if name not in written and value is not None]
        if unknown:
            raise ConfigError(f"this is no {cls.__name__}: {where} has the unknown field {unknown[0]!r}")
        for name, value in written.items():
            if name not in data:
                raise ConfigError(f"this is no {cls.__name__}: {where} lacks the field {name!r}")
            _compare(data[name], value, f"{where}.{name}", cls)
    elif isinstance(written, list):
        for index, (given, value) in enumerate(zip(data, written, strict=True)):
            _compare(given, value, f"{where}[{index}]", cls)
