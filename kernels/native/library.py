"""The CPU engine's shared library through ctypes, which lets other threads run while it works.

Importing this module loads nothing; the first call that needs the library does.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import threading
import weakref
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LIBRARY_NAME = "libunetrt_native.so"
LIBRARY_VARIABLE = "UNETRT_NATIVE_LIBRARY"
ALIGNMENT_BYTES = 64
"""Of packed weights."""

_HEADER_WORDS, _MAP_WORDS, _OPERATOR_WORDS = 8, 5, 24
_INPUT, _OUTPUT, _CLASSIFY = 0, 1, 11
_SCALE = 3
_POINTER, _BYTES = ctypes.c_void_p, ctypes.c_uint64

# Name -> result and arguments, as in include/unetrt_native.h.
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "unetrt_last_error": (ctypes.c_char_p, []),
    "unetrt_best_isa": (ctypes.c_int, [ctypes.c_int]),
    "unetrt_network_create": (_POINTER, [_POINTER, _BYTES, ctypes.c_int]),
    "unetrt_network_destroy": (None, [_POINTER]),
    "unetrt_network_packed_bytes": (_BYTES, [_POINTER]),
    "unetrt_network_pack": (ctypes.c_int, [_POINTER, _POINTER, _BYTES, _POINTER, _BYTES]),
    "unetrt_engine_create": (_POINTER, [_POINTER, _POINTER, _BYTES, ctypes.c_int]),
    "unetrt_engine_create_beside": (_POINTER, [_POINTER, _POINTER, _BYTES, _POINTER]),
    "unetrt_engine_destroy": (None, [_POINTER]),
    "unetrt_engine_run": (ctypes.c_int, [_POINTER, ctypes.c_int, _POINTER, _POINTER, _POINTER]),
    "unetrt_engine_profile": (
        ctypes.c_int,
        [_POINTER, ctypes.c_int, _POINTER, _POINTER, _POINTER, _POINTER, _BYTES],
    ),
}


class NativeError(RuntimeError):
    """The library is absent, or refused what it was given; the message is the library's."""


class Isa(IntEnum):
    """Instruction sets: those for fp32 and then those for bf16, each the slowest first."""

    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3
    AMX_BF16 = 4

    @property
    def precision(self) -> str:
        """What maps and the weights of convolutions are kept in; sums, norms and attention are fp32 in both."""
        return "bf16" if self >= Isa.AVX512_BF16 else "fp32"


_PRECISIONS = {"fp32": 0, "bf16": 1, "int8": 2}


def find_library() -> Path | None:
    """The file that UNETRT_NATIVE_LIBRARY names, or beside this one, or in a checkout's build/native; None: nowhere."""
    if named := os.environ.get(LIBRARY_VARIABLE):
        return Path(named) if Path(named).is_file() else None
    here = Path(__file__).resolve().parent
    checkout = here.parents[1]
    places = [here / LIBRARY_NAME]
    if (checkout / "pyproject.toml").is_file():
        places.append(checkout / "build" / "native" / LIBRARY_NAME)
    return next((path for path in places if path.is_file()), None)


def reason_against() -> str | None:
    """Why the engine is no good choice on this machine, or None."""
    try:
        isa = best_isa()
    except NativeError as error:
        return str(error)
    if isa == Isa.PORTABLE:
        return "the native engine is fast on x86-64 CPUs with AVX2 only, and this CPU or the compiler lacks that"
    return None


def best_isa(precision: str = "fp32") -> Isa:
    """The fastest instruction set of the library and this CPU for a precision; raises NativeError without one."""
    found = _library().unetrt_best_isa(_PRECISIONS[precision])
    if found < 0:
        raise NativeError(f"this CPU or library has no instructions for {precision}; take fp32")
    return Isa(found)


def empty_packed(count: int) -> NDArray[np.uint8]:
    """Memory for `count` bytes of packed weights, aligned as an engine needs it."""
    memory = np.empty(count + ALIGNMENT_BYTES, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT_BYTES
    return memory[first : first + count]


def _library() -> ctypes.CDLL:
    path = find_library()
    if path is not None:
        return _load(path)
    if named := os.environ.get(LIBRARY_VARIABLE):
        raise NativeError(f"{LIBRARY_VARIABLE} names {named}, which is no file; unset it, or name {LIBRARY_NAME}")
    raise NativeError("the native engine was not built (it needs a C++17 compiler at install time)")


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise NativeError(f"{path} is no native engine of this version ({error}); install the package again") from error
    return library


def _check(library: ctypes.CDLL, succeeded: bool) -> None:
    if not succeeded:
        raise NativeError((library.unetrt_last_error() or b"the native engine failed").decode(errors="replace"))


def _address(array: NDArray[Any]) -> int:
    return array.ctypes.data


class Network:
    """A checked program for one instruction set.

    classifies: whether it has log p beside its output.
    precision: the instruction set's, or int8 where the program has maps of bytes.
    words: int32 [n], as include/unetrt_native.h describes them. input_shape, output_shape: (channels, height, width).
    Raises NativeError for words that are no program.
    """

    def __init__(self, words: NDArray[np.int32], isa: Isa | None = None) -> None:
        self._library = _library()
        self.isa = best_isa() if isa is None else isa
        given = np.ascontiguousarray(words, np.int32)
        handle = self._library.unetrt_network_create(_address(given), given.size, int(self.isa))
        _check(self._library, handle is not None)
        self._handle = handle
        weakref.finalize(self, self._library.unetrt_network_destroy, handle)
        self.input_shape, self.output_shape = _find_shapes(given)
        self.classifies = bool((_read_operators(given)[:, 0] == _CLASSIFY).any())
        self.precision = "int8" if _read_maps(given)[:, _SCALE].any() else self.isa.precision
        self.operators, self.row_width = int(given[3]), int(given[6])

    @property
    def packed_bytes(self) -> int:
        return int(self._library.unetrt_network_packed_bytes(self._handle))

    def pack(self, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
        """weights [n] as this instruction set reads them; raises NativeError for another number of weights."""
        given = np.ascontiguousarray(weights, np.float32)
        packed = empty_packed(self.packed_bytes)
        status = self._library.unetrt_network_pack(
            self._handle, _address(given), given.size, _address(packed), packed.nbytes
        )
        _check(self._library, status == 0)
        return packed


def _read_maps(words: NDArray[np.int32]) -> NDArray[np.int32]:
    return words[_HEADER_WORDS : _HEADER_WORDS + _MAP_WORDS * int(words[2])].reshape(-1, _MAP_WORDS)


def _read_operators(words: NDArray[np.int32]) -> NDArray[np.int32]:
    return words[_HEADER_WORDS + _read_maps(words).size :].reshape(-1, _OPERATOR_WORDS)


def _find_shapes(words: NDArray[np.int32]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Of the input and the output of a program that was checked."""
    maps, operators = _read_maps(words), _read_operators(words)
    size = next((maps[op[1]] for op in operators if op[0] == _INPUT), maps[0])
    end = next(maps[op[2]] for op in operators if op[0] == _OUTPUT)
    return (int(words[4]), int(size[1]), int(size[2])), (int(words[5]), int(end[1]), int(end[2]))


class Engine:
    """A network with its weights and threads of its own; calls from several threads run one after the other.

    packed: from Network.pack or a file of it; kept for as long as the engine. threads: how many, or an engine whose
    threads it shares, for two whose calls follow one another. Raises NativeError for packed weights of another size or
    alignment, and for an engine that was closed.
    """

    def __init__(self, network: Network, packed: NDArray[np.uint8], threads: int | Engine) -> None:
        self._library = network._library
        self._shapes = network.input_shape, network.output_shape, network.row_width
        self._operators, self._classifies = network.operators, network.classifies
        self._packed = packed
        given = network._handle, _address(packed), packed.nbytes
        if isinstance(threads, Engine):
            with threads._lock:
                if threads._handle is None:
                    raise NativeError("the engine whose threads are to be shared was closed; give a number of threads")
                handle = self._library.unetrt_engine_create_beside(*given, threads._handle)
        else:
            handle = self._library.unetrt_engine_create(*given, threads)
        _check(self._library, handle is not None)
        self._handle: int | None = handle
        self._lock: threading.Lock = threading.Lock()
        # The weights outlive the engine's threads.
        self._destroy = weakref.finalize(self, _destroy, self._library, handle, packed)

    def run(self, x: NDArray[np.float32], rows: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """x [B, C, H, W] and rows [B, row width], None where that is 0 -> [B, C', H', W'], all float32.

        Raises NativeError for other shapes, and once closed.
        """
        return self._run(x, rows, None)[0]

    def classify(
        self, x: NDArray[np.float32], rows: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """As run, for a program that classifies, and log p [B]."""
        return self._run(x, rows, None)

    def profile(
        self, x: NDArray[np.float32], rows: NDArray[np.float32] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """As run, and what each operator of the program took: seconds [operators]."""
        seconds = np.empty(self._operators, np.float64)
        return self._run(x, rows, seconds)[0], seconds

    def _run(
        self, x: NDArray[np.float32], rows: NDArray[np.float32] | None, seconds: NDArray[np.float64] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        taken, made, width = self._shapes
        if x.ndim != 4 or not len(x) or x.shape[1:] != taken or x.dtype != np.float32:
            raise NativeError(f"x is {x.shape} {x.dtype}; expected [B, {', '.join(map(str, taken))}] float32")
        if width and (rows is None or rows.shape != (len(x), width) or rows.dtype != np.float32):
            got = "none" if rows is None else f"{rows.shape} {rows.dtype}"
            raise NativeError(f"rows are {got}; expected [{len(x)}, {width}] float32")
        given = np.ascontiguousarray(x)
        columns = np.ascontiguousarray(rows) if width else None
        images, numbers = len(x), len(x) * math.prod(made)
        out = np.empty(numbers + images * self._classifies, np.float32)
        with self._lock:
            if self._handle is None:
                raise NativeError("this engine was closed; make another")
            arguments = (
                self._handle, len(x), _address(given), None if columns is None else _address(columns), _address(out)
            )  # fmt: skip
            if seconds is None:
                status = self._library.unetrt_engine_run(*arguments)
            else:
                status = self._library.unetrt_engine_profile(*arguments, _address(seconds), seconds.size)
            _check(self._library, status == 0)
        return out[:numbers].reshape(images, *made), out[numbers:]

    def close(self) -> None:
        """End the threads and free the memory, after a call that is running."""
        with self._lock:
            self._handle = None
            self._destroy()


def _destroy(library: ctypes.CDLL, handle: int, packed: NDArray[np.uint8]) -> None:
    library.unetrt_engine_destroy(handle)
