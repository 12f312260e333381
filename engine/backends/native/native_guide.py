"""A classifier's input gradient on the CPU engine."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.backends.native.lowering import build_program
from engine.backends.native.native_backend import (
    NativeBackend,
    check_image,
    count_cores,
    find_isa,
    load_weights,
    make_network,
    pack_weights,
    told,
)
from engine.backends.native.program import Program
from engine.backends.native.time_rows import TimeRows
from engine.backends.native.transpose import transpose
from engine.backends.native.weight_cache import Content
from engine.bundle.bundle_folder import Bundle
from engine.bundle.file_names import CLASSIFIER, weights_name
from engine.errors import BackendError
from engine.networks.config import ClassifierConfig
from kernels.native.library import Engine, Isa, NativeError, Network


def build_gradient(config: ClassifierConfig) -> Program:
    """x_t -> d (factor * log p(label)) / d x_t, and log p(label). Columns of the rows: time projections, label, factor.

    Raises BackendError for a block that the engine does not have, or has no gradient of.
    """
    return transpose(build_program(config))


def unsupported(config: ClassifierConfig) -> str | None:
    """Why the engine has no gradient of this classifier, or None."""
    try:
        build_gradient(config)
    except BackendError as error:
        return str(error)
    return None


class NativeGuide:
    """An engine.diffusion.guidance.Guide with threads of its own, in fp32 or bf16. Bits depend on neither batch nor
    threads.
    """

    name = "native"

    def __init__(
        self, config: ClassifierConfig, network: Network, content: Content, threads: int | Engine | None = None
    ) -> None:
        """threads: None for one on each core that this process may use, an engine to share its. Raises BackendError."""
        self._config = config
        self.isa, self.precision = network.isa, network.precision
        self._rows = TimeRows(config, content.time)
        try:
            self._engine: Engine | None = Engine(network, content.packed, count_cores() if threads is None else threads)
        except NativeError as error:
            raise BackendError(f"the native engine cannot run this classifier: {error}") from error

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        precision: str = "fp32",
        threads: int | None = None,
        beside: NativeBackend | None = None,
    ) -> NativeGuide:
        """A bundle's classifier in "fp32" or "bf16"; its weights are packed once, in the user's cache folder.

        beside: a network called by turns with it, whose threads it shares. Raises BackendError or BundleError.
        """
        assert bundle.manifest.classifier is not None
        config = bundle.manifest.classifier.config
        program = build_gradient(config)
        network = make_network(program, find_isa(precision))
        content = load_weights(bundle, weights_name(CLASSIFIER), program, network)
        return cls(config, network, content, threads if beside is None else beside.engine)

    @classmethod
    def from_weights(
        cls,
        config: ClassifierConfig,
        state: Mapping[str, Tensor],
        threads: int | Engine | None = None,
        isa: Isa | None = None,
    ) -> NativeGuide:
        """A classifier without a bundle, of engine.networks.classifier.Classifier's state dict; isa None: the fastest
        in fp32.

        Raises BackendError.
        """
        program = build_gradient(config)
        network = make_network(program, find_isa("fp32") if isa is None else isa)
        return cls(config, network, pack_weights(program, network, state), threads)

    @property
    def config(self) -> ClassifierConfig:
        return self._config

    def __call__(self, x_t: Tensor, timestep: Tensor, label: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """See engine.diffusion.guidance.Guide; raises BackendError for inputs of other shapes and types, and once
        closed.
        """
        if self._engine is None:
            raise BackendError("this classifier was closed; open the bundle again")
        check_image("x_t", x_t, self._config.in_channels, self._config)
        given = ("timestep", timestep, torch.float32), ("label", label, torch.int64), ("scale", scale, torch.float32)
        for name, value, dtype in given:
            if value.shape != (len(x_t),) or value.dtype != dtype:
                raise BackendError(f"{name} is {list(value.shape)} {value.dtype}; expected [{len(x_t)}] {dtype}")
        # An image that is not guided may have a label that only the network knows.
        is_known = (label >= 0) & (label < self._config.num_classes)
        if not bool((is_known | (scale == 0)).all()):
            raise BackendError(f"labels are {label.tolist()}; expected 0 to {self._config.num_classes - 1}")
        label = torch.where(is_known, label, 0)
        projected = torch.from_numpy(self._rows(timestep, None))
        rows = torch.cat([projected, label[:, None].float(), scale.detach()[:, None]], dim=1)
        with told():
            grad, log_p = self._engine.classify(x_t.detach().contiguous().numpy(), rows.numpy())
        return torch.from_numpy(grad), torch.from_numpy(log_p)

    def close(self) -> None:
        """End the threads, once the calls that run are done."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None
