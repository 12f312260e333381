"""What several test files share: tolerances with their reasons, and small random checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.__main__ import main
from engine.bundle.bundle_folder import Bundle
from engine.bundle.manifest import ClassifierEntry, Manifest, NetworkEntry, Networks
from engine.diffusion.prediction import Diffusion, Variance
from engine.diffusion.schedule import cosine_schedule
from engine.networks import config as c
from engine.networks.classifier import Classifier
from engine.networks.unet import UNet
from recipes.openai_format import to_openai

# One fp32 forward call of a U-Net whose output is of order 1 to 4 differs by up to this between convolution kernels,
# thread counts and processors (measured on the golden cases: 0.3e-6 to 1.2e-6, with AVX2 kernels up to 3e-6).
FP32_FORWARD_ROUNDING = 3e-6

# The same float64 schedule with its sums and products in another order: an ulp a factor over up to 4000 of them.
FLOAT64_PRODUCT = 1e-11

# Two fp32 forward calls of a tiny network whose weights or sums differ by an ulp here and there: scales folded into
# weights and back, or a batch of another size, for which the convolutions choose another order of sums.
FP32_OTHER_ORDER = 2e-5


def adm_unet(
    *,
    channels: int = 1,
    size: tuple[int, int] = (8, 8),
    width: int = 32,
    mult: tuple[int, ...] = (1, 2),
    depth: int = 1,
    attention: Iterable[int] = (1,),
    heads: int | None = None,
    heads_up: int | None = None,
    head_dim: int = 32,
    scale_shift: bool = True,
    updown: bool = False,
    conv_resample: bool = True,
    num_classes: int | None = None,
    null_class: int | None = None,
    learn_sigma: bool = False,
    super_resolution: bool = False,
) -> c.UNetConfig:
    """The U-Net that guided-diffusion builds from these arguments of its constructor, as a block list.

    attention: levels with attention; heads beats head_dim. It is written from the original's constructor, and shares
    nothing with the translator.
    """

    def attend(ch: int, count: int | None) -> c.Attention:
        number = count or ch // head_dim
        return c.Attention(ch, number, ch // number)

    def res(cin: int, cout: int, how: c.Resample | None = None) -> c.ResBlock:
        return c.ResBlock(cin, cout, scale_shift, how)

    ch = mult[0] * width
    cond = channels if super_resolution else 0
    blocks: list[c.Block] = [c.Conv(channels + cond, ch), c.Push()]
    skips = [ch]
    for level, m in enumerate(mult):
        for _ in range(depth):
            blocks.append(res(ch, m * width))
            ch = m * width
            blocks += [attend(ch, heads)] if level in attention else []
            blocks.append(c.Push())
            skips.append(ch)
        if level < len(mult) - 1:
            blocks += [res(ch, ch, c.Resample.DOWN) if updown else c.Downsample(ch, conv_resample), c.Push()]
            skips.append(ch)
    blocks += [res(ch, ch), attend(ch, heads), res(ch, ch)]
    for level in reversed(range(len(mult))):
        for i in range(depth + 1):
            blocks += [c.Pop(), res(ch + skips.pop(), mult[level] * width)]
            ch = mult[level] * width
            blocks += [attend(ch, heads_up or heads)] if level in attention else []
            if level and i == depth:
                blocks.append(res(ch, ch, c.Resample.UP) if updown else c.Upsample(ch, conv_resample))
    out = channels * (2 if learn_sigma else 1)
    return c.UNetConfig(
        in_channels=channels, out_channels=out, image_size=size, time=c.TimeConfig(width, 4 * width),
        blocks=(*blocks, c.NormSiLU(ch), c.Conv(ch, out)), num_classes=num_classes, null_class=null_class,
        cond_channels=cond,
    )  # fmt: skip


def adm_classifier(
    *,
    channels: int = 1,
    size: tuple[int, int] = (8, 8),
    width: int = 32,
    mult: tuple[int, ...] = (1, 2),
    depth: int = 1,
    attention: Iterable[int] = (1,),
    head_dim: int = 32,
    scale_shift: bool = True,
    updown: bool = False,
    conv_resample: bool = True,
    num_classes: int = 10,
    attention_pool: bool = True,
) -> c.ClassifierConfig:
    """The classifier that guided-diffusion builds from these arguments: EncoderUNetModel; see adm_unet."""
    ch = mult[0] * width
    blocks: list[c.Block] = [c.Conv(channels, ch)]
    for level, m in enumerate(mult):
        for _ in range(depth):
            blocks.append(c.ResBlock(ch, m * width, scale_shift))
            ch = m * width
            blocks += [c.Attention(ch, ch // head_dim, head_dim)] if level in attention else []
        if level < len(mult) - 1:
            halving = c.ResBlock(ch, ch, scale_shift, c.Resample.DOWN) if updown else c.Downsample(ch, conv_resample)
            blocks.append(halving)
    middle = c.ResBlock(ch, ch, scale_shift)
    blocks += [middle, c.Attention(ch, ch // head_dim, head_dim), middle, c.NormSiLU(ch)]
    tokens = size[0] * size[1] // 4 ** (len(mult) - 1)
    pool = (
        c.AttentionPool(ch, ch // head_dim, head_dim, tokens, num_classes)
        if attention_pool
        else c.AveragePool(ch, num_classes)
    )
    return c.ClassifierConfig(channels, size, c.TimeConfig(width, 4 * width), (*blocks, pool), num_classes)


def random_network(config: c.UNetConfig | c.ClassifierConfig, seed: int = 0) -> nn.Module:
    """The network with random weights; norms too differ from 1 and 0, so that no two tensors can change places."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UNet(config) if isinstance(config, c.UNetConfig) else Classifier(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def openai_state(config: c.UNetConfig | c.ClassifierConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the keys of guided-diffusion, as its training saves them."""
    return to_openai(random_network(config, seed).state_dict(), config)


def write_checkpoint(path: Path, config: c.UNetConfig | c.ClassifierConfig, seed: int = 0) -> Path:
    """A checkpoint of the OpenAI family with random weights."""
    torch.save(openai_state(config, seed), path)
    return path


def tiny_manifest(config: c.UNetConfig, steps: int = 100) -> Manifest:
    """A manifest without files: cosine schedule, clipping, learned range where the network has the channels."""
    learned = config.out_channels == 2 * config.in_channels
    variance = Variance.LEARNED_RANGE if learned else Variance.FIXED_LARGE
    diffusion = Diffusion(cosine_schedule(steps), variance=variance)
    return Manifest("openai-guided", Networks(NetworkEntry(config)), diffusion, "00" * 32)


def with_unet(manifest: Manifest, **changes: Any) -> Manifest:
    """The manifest with other fields of its U-Net's entry."""
    unet = dataclasses.replace(manifest.unet, **changes)
    return dataclasses.replace(manifest, networks=dataclasses.replace(manifest.networks, unet=unet))


def with_classifier(manifest: Manifest, classifier: ClassifierEntry | None) -> Manifest:
    """The manifest with another classifier, or without one."""
    return dataclasses.replace(manifest, networks=dataclasses.replace(manifest.networks, classifier=classifier))


def write_bundle(folder: Path, config: c.UNetConfig, seed: int = 0) -> Path:
    """A bundle with random weights that the eager backend can run; nothing was exported."""
    folder.mkdir()
    weights = {name: value.contiguous() for name, value in random_network(config, seed).state_dict().items()}
    save_file(weights, folder / "unet.safetensors")
    Bundle.write(folder, tiny_manifest(config))
    return Bundle.open(folder).path


@dataclass(frozen=True)
class Outcome:
    """What a command line did: exit status, stdout, stderr."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one message after "error: "; there must be exactly one and no traceback."""
        assert self.status == 2, self
        assert "Traceback" not in self.err, self
        assert self.err.count("error: ") == 1, self
        return self.err.partition("error: ")[2]


def call_main(*argv: object) -> Outcome:
    """python -m engine ARGV in this process, neither output being a terminal."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), logging_restored():
        try:
            status = main([str(argument) for argument in argv])
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 1
    return Outcome(status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def logging_restored() -> Iterator[None]:
    """A command sets up the root logger for its process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
