"""A checkpoint file's content without what wraps its tensors, before any family looks at it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def without_wrappers(raw: Any) -> Any:
    """A file's content without the names that torch.compile and DataParallel put before those of the tensors.

    Looks at the dictionary and at the dictionaries in it.
    """
    if not isinstance(raw, Mapping):
        return raw
    return _bare_names({key: _bare_names(value) if isinstance(value, Mapping) else value for key, value in raw.items()})


def _bare_names(content: Mapping[Any, Any]) -> dict[Any, Any]:
    bare = {k.replace("_orig_mod.", "") if isinstance(k, str) else k: v for k, v in content.items()}
    tensors = [str(key) for key, value in bare.items() if isinstance(value, Tensor)]
    while tensors and all(name.startswith("module.") for name in tensors):
        bare = {k.removeprefix("module.") if isinstance(k, str) else k: v for k, v in bare.items()}
        tensors = [name.removeprefix("module.") for name in tensors]
    return bare
