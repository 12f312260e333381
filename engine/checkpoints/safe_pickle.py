"""Read any file torch.save wrote without importing or running what it names.

Tensors and plain data are rebuilt; every other class becomes an inert placeholder that accepts whatever the pickle
does to it and does nothing. A name that could only be there to run code makes the file refused, as a diagnosis: it
would have been inert as well.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from engine.errors import CheckpointError

_CODE_MODULES = frozenset(
    (
        *("os", "posix", "nt", "subprocess", "sys", "runpy", "shutil", "socket", "importlib", "ctypes", "pty"),
        *("commands", "code", "codeop", "webbrowser", "pickle", "_pickle", "marshal", "timeit", "pdb", "bdb"),
    )
)
_CODE_BUILTINS = frozenset(("eval", "exec", "compile", "open", "input", "breakpoint", "__import__"))
_PLAIN_BUILTINS = {t.__name__: t for t in (set, frozenset, complex, bytearray, slice, range)}


class Inert:
    """Stands in for a class that is not loaded: takes any construction, state or item, and does nothing."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        pass

    def __new__(cls, *_args: object, **_kwargs: object) -> Inert:
        return object.__new__(cls)

    def __call__(self, *_args: object, **_kwargs: object) -> Inert:
        return self

    def __setstate__(self, _state: object) -> None:
        pass

    def __setitem__(self, _key: object, _value: object) -> None:
        pass

    def append(self, _item: object) -> None:
        pass

    def extend(self, _items: object) -> None:
        pass

    def add(self, _item: object) -> None:
        pass


def _allowed() -> dict[tuple[str, str], Any]:
    utils = torch._utils  # noqa: SLF001
    names: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("collections", "defaultdict"): lambda *_: {},
        ("torch", "Size"): torch.Size,
        ("torch", "device"): torch.device,
        ("torch._utils", "_rebuild_tensor"): utils._rebuild_tensor,
        ("torch._utils", "_rebuild_tensor_v2"): utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): utils._rebuild_parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): lambda data, grad, hooks, _state: utils._rebuild_parameter(
            data, grad, hooks
        ),
    }
    for attribute in dir(torch):
        value = getattr(torch, attribute)
        if isinstance(value, torch.dtype):
            names["torch", attribute] = value
    return names


class _Unpickler(pickle.Unpickler):
    """Resolves names against a fixed list; everything else is a fresh Inert subclass or an error."""

    _names: ClassVar[dict[tuple[str, str], Any]] = _allowed()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._names:
            return self._names[module, name]
        is_builtin = module in ("builtins", "__builtin__", "io", "_io")
        if is_builtin and name in _PLAIN_BUILTINS:
            return _PLAIN_BUILTINS[name]
        if module.split(".")[0] in _CODE_MODULES or (is_builtin and name in _CODE_BUILTINS):
            raise CheckpointError(
                f"the file would run code when loaded: it names {module}.{name}. Nothing was run. "
                "Do not load it with other programs; get the checkpoint from a source you trust"
            )
        return type(name.split(".")[-1], (Inert,), {"__module__": "inert"})


def _load(file: Any, **_options: object) -> Any:
    return _Unpickler(file).load()


# torch.load takes the pickle module to use; this one resolves nothing outside the list above.
_PICKLE = SimpleNamespace(
    Unpickler=_Unpickler, load=_load, loads=lambda data, **_: _load(io.BytesIO(data)), __name__="safe"
)


def read_torch_file(path: Path) -> Any:
    """The object in a file that torch.save wrote (zip or the format before 1.6), tensors on the CPU.

    Raises CheckpointError for a truncated file, a zip that is not a checkpoint, a TorchScript archive, or a pickle
    that names code.
    """
    if zipfile.is_zipfile(path):
        _check_zip(path)
    try:
        return torch.load(path, map_location="cpu", pickle_module=_PICKLE, weights_only=False)
    except CheckpointError:
        raise
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        # A damaged pickle can fail in any way: opcodes, indices, storages, encodings.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({reason}); it is truncated or not a file that torch.save "
            "wrote. Copy it again and compare its size with the original"
        ) from error


def _check_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(f"{path} is a TorchScript archive; pass the training checkpoint (its state dict) instead")
    if not any(name.endswith("/data.pkl") for name in names):
        raise CheckpointError(
            f"{path} is a zip file but no checkpoint: it has no data.pkl and holds "
            f"{', '.join(names[:3]) or 'nothing'}; unpack it and pass the checkpoint inside"
        )
