"""The pictures of the pages on sampling and guidance, made with the shipped digits model.

python docs/make/pictures.py demo/digits.engine

Writes docs/pictures/*.png and docs/pictures/steps.md; seeds are fixed, so a second run gives the same files.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from engine import ClassifierFreeGuidance, Sampler  # noqa: E402
from engine.images import grid, to_uint8  # noqa: E402
from judging.digits import EVALUATOR, load_split  # noqa: E402
from judging.evaluator import load_evaluator, read_digits  # noqa: E402
from judging.metrics import Moments, frechet  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
ENLARGE = 2
CLASSES = list(range(10))
SAMPLERS = ("ddim", "dpmpp", "plms", "ddpm")
STEPS = (5, 10, 20, 50)
COUNT = 200


def save_rows(name: str, rows: Sequence[tuple[str, Tensor]], enlarge: int = ENLARGE) -> None:
    """Rows of images [n, 1, H, W] with a label in front of each, as docs/pictures/NAME.png."""
    font = ImageFont.load_default(size=13)
    strips = [grid(to_uint8(images), len(images), enlarge)[..., 0] for _, images in rows]
    margin = 12 + max(int(font.getlength(label)) for label, _ in rows)
    height, width = strips[0].shape
    gap = 4
    canvas = Image.new("L", (margin + width, len(rows) * (height + gap) - gap), 255)
    draw = ImageDraw.Draw(canvas)
    for number, ((label, _), strip) in enumerate(zip(rows, strips, strict=True)):
        top = number * (height + gap)
        canvas.paste(Image.fromarray(strip), (margin, top))
        draw.text((margin - 8, top + height / 2), label, fill=40, font=font, anchor="rm")
    PICTURES.mkdir(exist_ok=True)
    canvas.save(PICTURES / f"{name}.png", optimize=True)


def free_guidance(sampler: Sampler) -> None:
    """The same ten seeds and labels at rising scales."""
    rows = []
    for scale in (0.0, 1.0, 2.0, 4.0, 8.0):
        images = sampler.sample(10, labels=CLASSES, seed=40, **guided(ClassifierFreeGuidance(scale)))
        rows.append((f"scale {scale:g}", images))
    rescaled = ClassifierFreeGuidance(8.0, rescale=0.9)
    early = ClassifierFreeGuidance(8.0, interval=(500, 999))
    rows.append(("8, rescale 0.9", sampler.sample(10, labels=CLASSES, seed=40, **guided(rescaled))))
    rows.append(("8, t from 500 on", sampler.sample(10, labels=CLASSES, seed=40, **guided(early))))
    save_rows("guidance-scale", rows)


def guided(guidance: ClassifierFreeGuidance) -> dict[str, Any]:
    return {"guidance_scale": guidance}


def classifier(sampler: Sampler) -> None:
    """The network without a label, pulled by the classifier."""
    null = sampler.config.null_class
    rows = []
    for scale in (0.0, 2.0, 8.0):
        guidance = sampler.classifier_guidance(scale)
        # A request's label is the network's and the classifier's; scale 0 of the network's own is "no label".
        free = guided(ClassifierFreeGuidance(0.0))
        rows.append(
            (f"scale {scale:g}", sampler.sample(10, labels=CLASSES, steps="ddim50", seed=7, guidance=guidance, **free))
        )
    assert null is not None
    save_rows("classifier-scale", rows)


def progress(sampler: Sampler) -> None:
    """x and x0 of two images after some of 50 steps."""
    made = sampler.progressive(2, labels=[3, 8], seed=5)
    shown = [0, 5, 10, 15, 20, 25, 30, 35, 40, 49]
    rows = []
    for number, digit in enumerate((3, 8)):
        rows += [
            (f"x, a {digit}", made.x[number, shown].clamp(-1, 1)),
            ("x0", made.x0[number, shown].clamp(-1, 1)),
        ]
    save_rows("progress", rows)


def inpainting(sampler: Sampler) -> None:
    """The lower half of ten digits made anew, with three seeds."""
    images = sampler.sample(10, labels=CLASSES, seed=40)
    mask = torch.zeros(images.shape[-2:])
    mask[16:] = 1
    rows = [("image", images), ("kept", torch.where(mask > 0, torch.zeros(()), images))]
    for seed in (100, 200):
        filled = sampler.inpaint(images, mask, labels=CLASSES, seed=seed, sampler="ddpm", variance="fixed_small",
                                 jump_length=5, resamplings=4)  # fmt: skip
        rows.append((f"seed {seed}", filled))
    save_rows("inpainting", rows)


def interpolation(sampler: Sampler) -> None:
    """From one seed to another, for three classes."""
    save_rows("interpolation", [(f"a {y}", sampler.interpolate(3, 12, 10, labels=y)) for y in (0, 5, 8)])


def variations(sampler: Sampler) -> None:
    """img2img of one image: more noise, more change."""
    image = sampler.sample(1, labels=4, seed=44).expand(10, -1, -1, -1).contiguous()
    rows = [
        (f"strength {strength:g}", sampler.img2img(image, strength, labels=4, seed=60))
        for strength in (0.3, 0.5, 0.7, 0.9)
    ]
    save_rows("img2img", rows)


def steps(sampler: Sampler) -> None:
    """One picture of the first digits, and a table of what the evaluator says of COUNT images a cell."""
    model = load_evaluator(EVALUATOR)
    parts = load_split()
    train = Moments.of(read_digits(model, parts["train"].images)[1])
    labels = [i % 10 for i in range(COUNT)]
    real, features = read_digits(model, parts["held_out"].images)
    right = 100 * float((real.argmax(dim=1) == parts["held_out"].labels).float().mean())
    lines = ["| steps | " + " | ".join(SAMPLERS) + " |", "| --- |" + " --- |" * len(SAMPLERS)]
    rows = []
    for count in STEPS:
        cells = []
        for name in SAMPLERS:
            images = sampler.sample(COUNT, steps=count, sampler=name, labels=labels, seed=1000, batch_size=50)
            logits, found = read_digits(model, images)
            share = 100 * float((logits.argmax(dim=1) == torch.tensor(labels)).float().mean())
            cells.append(f"{share:.1f} %, {frechet(found, train):.2f}")
            if name in ("ddim", "ddpm"):
                rows.append((f"{name}, {count}", images[:10]))
        lines.append(f"| {count} | " + " | ".join(cells) + " |")
    rows.sort(key=lambda row: row[0].partition(",")[0])
    save_rows("steps", rows)
    lines += ["", f"{len(real)} real held-out digits: {right:.1f} %, {frechet(features, train):.2f}."]
    (PICTURES / "steps.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(bundle: str, chosen: Sequence[str]) -> None:
    sampler = Sampler.open(bundle, "native", "fp32")
    makers = (free_guidance, classifier, progress, inpainting, interpolation, variations, steps)
    for make in makers:
        if not chosen or make.__name__ in chosen:
            print(make.__name__, flush=True)
            make(sampler)
    sampler.close()


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main(sys.argv[1], sys.argv[2:])
