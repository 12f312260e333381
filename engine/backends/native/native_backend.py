"""The network on the CPU engine of kernels/native: fp32, bf16 or int8, no other package needed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.backends.native.byte_ranges import ByteRange, read_ranges, with_int8
from engine.backends.native.lowering import build_program
from engine.backends.native.program import FORMAT, Program
from engine.backends.native.time_rows import PREFIX, TimeRows
from engine.backends.native.weight_cache import Content, Key, load_or_pack
from engine.bundle.bundle_folder import Bundle
from engine.bundle.file_names import UNET, ranges_name, weights_name
from engine.bundle.manifest import Manifest
from engine.errors import BackendError
from engine.networks.config import ClassifierConfig, UNetConfig
from engine.networks.inputs import UNCONDITIONED, Conditions, Inputs
from kernels.native.library import Engine, Isa, NativeError, Network, best_isa

_CPUS = Path("/sys/devices/system/cpu")


class NativeBackend:
    """One engine with threads of its own. An image's bits depend on neither its batch nor the number of threads."""

    name = "native"

    def __init__(self, manifest: Manifest, network: Network, content: Content, threads: int | None = None) -> None:
        """threads: None for one on each core that this process may use. Raises BackendError."""
        self.manifest = manifest
        self.device = torch.device("cpu")
        self.isa, self.precision = network.isa, network.precision
        self._rows = TimeRows(manifest.unet.config, content.time)
        try:
            self._engine: Engine | None = Engine(network, content.packed, count_cores() if threads is None else threads)
        except NativeError as error:
            raise BackendError(f"the native engine cannot run this network: {error}") from error

    @classmethod
    def open(cls, bundle: Bundle, precision: str = "fp32", threads: int | None = None) -> NativeBackend:
        """A bundle's network; its weights are packed once and then kept in the user's cache folder.

        precision: "fp32", "bf16" or "int8", on the fastest instruction set of this CPU. int8 is bf16 with 8-bit
        convolutions, those that unet.int8.json names. Raises BackendError or BundleError.
        """
        ranges = read_ranges(bundle.file(ranges_name(UNET))) if precision == "int8" else {}
        program = with_int8(build_program(bundle.manifest.unet.config), ranges)
        network = make_network(program, find_isa(precision))
        return cls(bundle.manifest, network, load_weights(bundle, weights_name(UNET), program, network), threads)

    @classmethod
    def from_weights(
        cls,
        manifest: Manifest,
        state: Mapping[str, Tensor],
        threads: int | None = None,
        isa: Isa | None = None,
        ranges: Mapping[str, ByteRange] = MappingProxyType({}),
    ) -> NativeBackend:
        """A network without a bundle, its weights those of engine.networks.unet.UNet's state dict. Raises BackendError.

        isa: None for this CPU's fastest in fp32. ranges: of the inputs of convolutions to compute in int8, which needs
        an instruction set for bf16.
        """
        program = with_int8(build_program(manifest.unet.config), ranges)
        network = make_network(program, find_isa("fp32") if isa is None else isa)
        return cls(manifest, network, pack_weights(program, network, state), threads)

    def __call__(self, x_t: Tensor, timestep: Tensor, conditions: Conditions = UNCONDITIONED) -> Tensor:
        """See engine.backends.protocol.Backend; raises BackendError for inputs of other shapes and types, and once
        closed.
        """
        engine, x, rows = self._prepare(Inputs(x_t, timestep, conditions))
        with told():
            out = engine.run(x, rows)
        return self._finish(out, timestep)

    def profile(
        self, x_t: Tensor, timestep: Tensor, conditions: Conditions = UNCONDITIONED
    ) -> tuple[Tensor, NDArray[np.float64]]:
        """The same, and the seconds that each operator of engine.backends.native.lowering.build_program took."""
        engine, x, rows = self._prepare(Inputs(x_t, timestep, conditions))
        with told():
            out, seconds = engine.profile(x, rows)
        return self._finish(out, timestep), seconds

    def _prepare(self, inputs: Inputs) -> tuple[Engine, NDArray[np.float32], NDArray[np.float32]]:
        engine = self.engine
        timestep = inputs.timestep
        x = _join(self.manifest.unet.config, inputs.x_t, inputs.conditions.image)
        if len(timestep) != len(x):
            raise BackendError(f"x_t has {len(x)} images and timestep {len(timestep)}; expected as many")
        return engine, x.contiguous().numpy(), self._rows(timestep, inputs.conditions.label)

    def _finish(self, out: NDArray[np.float32], timestep: Tensor) -> Tensor:
        result = torch.from_numpy(out)
        return result / timestep[:, None, None, None] if self.manifest.unet.config.divides_by_timestep else result

    @property
    def engine(self) -> Engine:
        """What runs; raises BackendError once closed."""
        if self._engine is None:
            raise BackendError("this backend was closed; open the bundle again")
        return self._engine

    def close(self) -> None:
        """End the threads, once the calls that run are done; those that a classifier shares end with that."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None


@contextmanager
def told() -> Iterator[None]:
    """The library's errors as this package's."""
    try:
        yield
    except NativeError as error:
        raise BackendError(f"the native engine failed: {error}") from error


def unsupported(config: UNetConfig) -> str | None:
    """Why the engine cannot run a network of this description, or None."""
    try:
        build_program(config)
    except BackendError as error:
        return str(error)
    return None


def count_cores() -> int:
    """Cores on which this process may run; hardware threads of one core share its arithmetic units and count once."""
    return len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})


def _siblings(cpu: int) -> str:
    try:
        return (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return str(cpu)


def find_isa(precision: str) -> Isa:
    """The fastest instruction set for a precision; raises BackendError where there is none."""
    try:
        return best_isa(precision)
    except NativeError as error:
        raise BackendError(f"the native backend cannot be used: {error}") from error


def make_network(program: Program, isa: Isa) -> Network:
    """A program for an instruction set; raises BackendError where the library refuses it."""
    try:
        return Network(program.words(), isa)
    except NativeError as error:
        raise BackendError(f"the native backend cannot be used: {error}") from error


def pack_weights(program: Program, network: Network, state: Mapping[str, Tensor]) -> Content:
    """What an engine needs of a state dict; raises BackendError for weights that do not fit the program."""
    time = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    return Content({name: value.float() for name, value in time.items()}, network.pack(program.gather(state)))


def load_weights(bundle: Bundle, name: str, program: Program, network: Network) -> Content:
    """What an engine needs of the bundle's file `name`: from the user's cache folder, or packed and kept there.

    Raises BackendError or BundleError.
    """
    entry = bundle.manifest.files.get(name)
    digest = hashlib.sha256(program.words().tobytes()).hexdigest()
    key = Key(entry.sha256 if entry else "", digest, network.isa.name.lower(), FORMAT)
    return load_or_pack(key, network.packed_bytes, lambda: _pack_bundle(bundle, name, program, network))


def _pack_bundle(bundle: Bundle, name: str, program: Program, network: Network) -> Content:
    from safetensors.torch import load_file

    return pack_weights(program, network, load_file(bundle.file(name)))


def _join(config: UNetConfig, x_t: Tensor, image: Tensor | None) -> Tensor:
    """The engine's input [B, C + Cc, H, W]."""
    check_image("x_t", x_t, config.in_channels, config)
    if image is None and not config.cond_channels:
        return x_t.detach()
    if image is None or not config.cond_channels:
        got = "none" if image is None else f"one of {list(image.shape)}"
        raise BackendError(f"the network takes a condition image of {config.cond_channels} channels, got {got}")
    check_image("image", image, config.cond_channels, config)
    if len(image) != len(x_t):
        raise BackendError(f"x_t has {len(x_t)} images and the condition {len(image)}; expected as many")
    return torch.cat([image, x_t] if config.cond_first else [x_t, image], dim=1).detach()


def check_image(name: str, image: Tensor, channels: int, config: UNetConfig | ClassifierConfig) -> None:
    """Raise BackendError for anything but [B, channels, H, W] float32 of the network's size."""
    wanted = (channels, *config.image_size)
    if image.ndim != 4 or not len(image) or image.shape[1:] != wanted or image.dtype != torch.float32:
        raise BackendError(
            f"{name} is {list(image.shape)} {image.dtype}; expected [B, {', '.join(map(str, wanted))}] float32"
        )
