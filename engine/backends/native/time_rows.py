"""The time projections that the CPU engine takes with each call, one row an image."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import BackendError
from engine.networks.config import ClassifierConfig, LabelInput, UNetConfig
from engine.networks.unet import TimeEmbedding
from engine.threads import torch_threads

PREFIX = "time."
"""Of the names of a state dict's tensors that make the rows."""

MOST_ROWS = 4096
MOST_BYTES = 64 * 2**20

_LABEL_TYPES = {LabelInput.TABLE: torch.int64, LabelInput.NUMBER: torch.float32, LabelInput.VECTOR: torch.float32}


class TimeRows:
    """The stacked time projections of a network by timestep and label; the rows used last are kept.

    tensors: a state dict's of PREFIX, without it. Every row is computed on its own and on one thread, so that neither
    the batch nor the machine's load changes it. May be called from several threads.
    """

    def __init__(self, config: UNetConfig | ClassifierConfig, tensors: Mapping[str, Tensor]) -> None:
        with torch.device("meta"):
            embedding = TimeEmbedding(config)
        embedding.load_state_dict(dict(tensors), assign=True)
        self._embedding = embedding.eval().requires_grad_(False)
        self._config = config
        self.width = sum(config.projection_channels)
        self._most = max(1, min(MOST_ROWS, MOST_BYTES // (4 * max(1, self.width))))
        self._rows: OrderedDict[Hashable, NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, timestep: Tensor, label: Tensor | None) -> NDArray[np.float32]:
        """timestep [B] float32, label as engine.networks.config.LabelInput says or None -> [B, width] float32.

        Raises BackendError for other shapes and types, and for a timestep or label outside its table.
        """
        self._check_timestep(timestep)
        if self.width == 0:
            return np.empty((len(timestep), 0), np.float32)
        labels = self._labels(label, len(timestep))
        with self._lock:
            keys = zip(timestep.tolist(), labels, strict=True)
            return np.stack([self._row(key, i, timestep, label) for i, key in enumerate(keys)])

    def _row(self, key: Hashable, index: int, timestep: Tensor, label: Tensor | None) -> NDArray[np.float32]:
        row = self._rows.get(key)
        if row is None:
            own = None if label is None or self._config.num_classes is None else label[index, None]
            with torch_threads(1), torch.inference_mode():
                row = torch.cat(self._embedding(timestep[index, None], own), dim=1)[0].numpy()
            self._rows[key] = row
            if len(self._rows) > self._most:
                self._rows.popitem(last=False)
        self._rows.move_to_end(key)
        return row

    def _check_timestep(self, timestep: Tensor) -> None:
        if timestep.ndim != 1 or timestep.dtype != torch.float32:
            raise BackendError(f"timestep is {list(timestep.shape)} {timestep.dtype}; expected [B] float32")
        rows = None if self._config.time is None else self._config.time.table_rows
        if rows is not None and not bool(((timestep.round() >= 0) & (timestep.round() < rows)).all()):
            raise BackendError(f"timesteps are {timestep.tolist()}; the network has rows for 0 to {rows - 1}")

    def _labels(self, label: Tensor | None, count: int) -> Sequence[Hashable]:
        """What tells labels apart; a network without labels ignores label."""
        config = self._config
        if label is None or config.num_classes is None:
            return [None] * count
        assert isinstance(config, UNetConfig)
        wanted = (count, config.label_channels) if config.label is LabelInput.VECTOR else (count,)
        dtype = _LABEL_TYPES[config.label]
        if tuple(label.shape) != wanted or label.dtype != dtype:
            raise BackendError(f"label is {list(label.shape)} {label.dtype}; expected {list(wanted)} {dtype}")
        if config.label is LabelInput.VECTOR:
            return [row.numpy().tobytes() for row in label]
        if config.label is LabelInput.TABLE and not bool(((label >= 0) & (label < config.num_classes)).all()):
            raise BackendError(f"labels are {label.tolist()}; expected 0 to {config.num_classes - 1}")
        return label.tolist()
