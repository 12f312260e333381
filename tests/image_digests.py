"""Digests of seeded images of the shipped models: what a change of the code's shape must not change.

python tests/image_digests.py record BUNDLE FILE      writes one sha256 a case
python tests/image_digests.py check BUNDLE FILE       says which cases differ, exit status 1 if any

Digests hold on the machine and library versions that wrote them: libraries and instruction sets round differently.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import ClassifierFreeGuidance, ClassifierGuidance, Sampler

_CFG_FLAGS = ["--guidance-scale", "2.5", "--guidance-interval", "100", "900"]
BACKENDS = (
    ("native", "fp32"),
    ("native", "bf16"),
    ("native", "int8"),
    ("ort", "fp32"),
    ("ov", "fp32"),
    ("eager", "fp32"),
)
_SHORT: dict[str, Any] = {"steps": 6, "seed": 3, "batch_size": 3}


def digest(*tensors: Tensor) -> str:
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.contiguous().numpy().tobytes())
    return whole.hexdigest()


def free_guidance(**values: Any) -> dict[str, Any]:
    """Classifier-free guidance as options of sample(): both halves count in its batch of three images."""
    return {"guidance_scale": ClassifierFreeGuidance(**values), "batch_size": 6}


def samplings(sampler: Sampler) -> dict[str, dict[str, Any]]:
    """Options of sample() by name."""
    clf = sampler.classifier_guidance(2.0)
    part = ClassifierGuidance(clf.guide, 1.5, interval=(100, 700))
    return {
        "ddim": {},
        "ddim eta": {"eta": 0.5},
        "ddim respaced": {"steps": "3,2,2"},
        "ddim ddimN": {"steps": "ddim5"},
        "ddpm": {"sampler": "ddpm"},
        "dpmpp": {"sampler": "dpmpp"},
        "plms": {"sampler": "plms"},
        "labels": {"labels": [7, 1, 0, 9, 4]},
        "one label": {"labels": 7, "seeds": [5, 2**40, 0, 1, 9]},
        "cfg": free_guidance(scale=3.0),
        "cfg parts": free_guidance(scale=2.5, rescale=0.7, parallel=0.3),
        "cfg interval": free_guidance(scale=3.0, interval=(200, 800)) | {"sampler": "ddpm"},
        "cfg++": free_guidance(scale=0.6, plus_plus=True),
        "classifier ddim": {"guidance": clf, "steps": "ddim6"},
        "classifier ddpm": {"guidance": part, "sampler": "ddpm"},
        "both": {"guidance": clf, "sampler": "dpmpp", "steps": "ddim6"} | free_guidance(scale=2.0),
        "recorded noise": {"noise": _counting_noise, "sampler": "ddpm"},
    }


def _counting_noise(seeds: Any, draws: Any, shape: Any, stream: int = 0) -> Any:
    """A source of one's own: numbers from torch, seeded by seed, draw and stream."""
    made = []
    for seed, draw in zip(seeds, draws, strict=True):
        rng = torch.Generator().manual_seed((int(seed) * 1009 + int(draw) * 31 + stream) % 2**31)
        made.append(torch.randn(tuple(shape), generator=rng))
    return torch.stack(made).numpy()


def verbs(sampler: Sampler) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Every verb, each a function that makes one tensor."""
    images = sampler.sample(3, steps=4, seed=11)
    mask = torch.zeros(images.shape[-2:])
    mask[8:20, 10:] = 1
    yield "stream", lambda: torch.stack([p.x0 for p in sampler.stream(4, **_SHORT)])
    yield "progressive", lambda: torch.cat([(p := sampler.progressive(4, **_SHORT)).x, p.x0])
    yield "interpolate", lambda: sampler.interpolate(1, 2, 4, steps=5)
    yield "encode", lambda: sampler.encode(images, steps=5)
    yield (
        "decode",
        lambda: sampler.decode(torch.randn(2, *images.shape[1:], generator=torch.Generator().manual_seed(0)), steps=5),
    )
    yield "img2img", lambda: sampler.img2img(images, 0.6, **_SHORT)
    yield "img2img ddpm", lambda: sampler.img2img(images, 0.6, sampler="ddpm", **_SHORT)
    yield "inpaint", lambda: sampler.inpaint(images, mask, **_SHORT)
    yield "inpaint jumps", lambda: sampler.inpaint(images, mask, jump_length=2, resamplings=2, **_SHORT)
    yield "inpaint cfg", lambda: sampler.inpaint(images, mask, sampler="ddpm", **_SHORT | free_guidance(scale=2.0))
    yield "nll", lambda: sampler.nll(images, steps=4)


def command_lines(bundle: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """Files that `python -m engine sample` writes: one digest over the bytes of all that hold no time or place."""
    from engine.__main__ import main

    lines = {
        "png": ["-n", "6", "--steps", "4", "--seed", "2"],
        "npz, cfg": ["-n", "5", "--steps", "4", "--format", "npz", "--class", "3", *_CFG_FLAGS],
        "classifier": ["-n", "4", "--steps", "ddim4", "--classifier-scale", "1.5"],
        "shards": ["-n", "20", "--steps", "3", "--shard-size", "10", "--per-class", "--merge"],
        "shards png": ["-n", "10", "--steps", "3", "--shard-size", "5", "--format", "png"],
    }

    def run(arguments: list[str]) -> str:
        with tempfile.TemporaryDirectory() as folder:
            status = main(["sample", str(bundle), *arguments, "--out", folder, "--batch-size", "4"])
            assert status == 0, arguments
            whole = hashlib.sha256()
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file() and path.name != "run.json":
                    whole.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
            return whole.hexdigest()

    for name, arguments in lines.items():
        yield f"command line: {name}", lambda a=arguments: run(a)


def cases(bundle: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """Name and digest of every case, made when it is called."""
    for backend, precision in BACKENDS:
        sampler = Sampler.open(bundle, backend, precision)
        for name, options in samplings(sampler).items():
            merged = _SHORT | options
            if "seeds" in merged:
                merged.pop("seed")
            yield f"{backend} {precision}: {name}", lambda s=sampler, o=merged: digest(s.sample(5, **o))
        for name, make in verbs(sampler):
            yield f"{backend} {precision}: {name}", lambda m=make: digest(m())
        sampler.close()
    yield from command_lines(bundle)


def main(arguments: list[str]) -> int:
    action, bundle, file = arguments[0], Path(arguments[1]), Path(arguments[2])
    found = {name: make() for name, make in cases(bundle)}
    if action == "record":
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{len(found)} digests written to {file}")
        return 0
    before = json.loads(file.read_text(encoding="utf-8"))
    wrong = [name for name in before if found.get(name) != before[name]]
    print(f"{len(before) - len(wrong)} of {len(before)} digests as recorded")
    print("\n".join(f"differs: {name}" for name in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
