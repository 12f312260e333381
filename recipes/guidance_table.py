"""What guidance and inversion do on the shipped digits model: a page with two tables, and a picture.

    python -m recipes.guidance_table digits.engine --classifier assets/classifier.pt --out docs/digits.md

The bundle holds the classifier's gradient as a graph (export with --classifier). Images start without a label (the
null class) and the classifier alone pulls them towards the class that is asked for: DDIM with eta 0, Dhariwal & Nichol
(2021), algorithm 2. The same images are made again with torch autograd in place of the graph. Inversion encodes
held-out digits with their labels and decodes them.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine import ClassifierGuidance, Sampler, load_checkpoint
from engine.diffusion.guidance import Guide
from engine.files import atomic_path
from engine.images import grid, save_png, to_uint8
from engine.networks.classifier import AutogradGuide
from judging.digits import CLASSES, CLASSIFIER, EVALUATOR, load_split
from judging.evaluator import load_evaluator, read_digits
from judging.metrics import psnr

SCALES = (0.0, 1.0, 2.0, 4.0, 8.0)
STEPS = "ddim50"
"""Not 50: that one begins at t = 999, where x_t holds nothing that a classifier could follow."""
INVERSION_STEPS = (50, 100, 250)
BATCH = 25


@dataclass(frozen=True, slots=True)
class GuidedRow:
    """accuracy: share of images read as the class asked for. psnr: in dB, of the graph's images beside autograd's."""

    scale: float
    accuracy: float
    psnr: float | None


def guided(sampler: Sampler, guide: Guide, scale: float, n: int) -> Tensor:
    """n images [n, 1, 32, 32] from seeds 0 to n - 1, the classes asked for in turn, the network itself unlabelled."""
    guidance = ClassifierGuidance(guide, scale)
    labels = [i % CLASSES for i in range(n)]
    requests = [
        dataclasses.replace(request, conditions=request.without or request.conditions)
        for request in sampler.requests(n, steps=STEPS, labels=labels, guidance=guidance if scale else None)
    ]
    images = torch.empty(n, sampler.config.in_channels, *sampler.config.image_size)
    for step in sampler.run(requests, guide, batch_size=BATCH):
        if step.is_last:
            images[step.request.index] = step.x_prev.clamp(-1, 1)
    return images


def accuracy(images: Tensor) -> float:
    """Share of images, of classes 0 to 9 in turn, that the evaluator reads as their class."""
    logits, _ = read_digits(load_evaluator(EVALUATOR), images)
    return float((logits.argmax(dim=1) == torch.arange(len(images)) % CLASSES).double().mean())


def inversion_psnr(sampler: Sampler, count: int, steps: int) -> float:
    """Of held-out digits, one of each class in turn, encoded as noise and decoded again."""
    digits = load_split()["held_out"]
    rows = torch.cat([(digits.labels == k).nonzero()[: -(-count // CLASSES), 0] for k in range(CLASSES)])[:count]
    labels = digits.labels[rows].tolist()
    options = {"steps": steps, "labels": labels, "batch_size": BATCH}
    noise = sampler.encode(digits.images[rows], **options)  # type: ignore[arg-type]
    return psnr(sampler.decode(noise, **options), digits.images[rows]).whole  # type: ignore[arg-type]


def page(rows: Sequence[GuidedRow], n: int, compared: int, inversion: dict[int, float], digits: int) -> str:
    """The Markdown page."""
    lines = [
        "# Guidance and inversion on the digits model",
        "",
        "Made by `python -m recipes.guidance_table digits.engine --out docs/digits.md` in fp32.",
        "",
        "## Classifier guidance from an unconditional start",
        "",
        f"`{STEPS}`: 50 DDIM steps (eta 0) from t = 980 on, the network without a label, {n} images a scale from the",
        "same seeds, classes 0 to 9 in turn; the evaluator never saw the training digits. PSNR: the images of the",
        f"exported gradient graph beside those of torch autograd, {compared} a scale.",
        "",
        "| classifier scale | read as the class asked for | graph beside autograd |",
        "|---|---|---|",
    ]
    lines += [
        f"| {row.scale:g} | {row.accuracy:.1%} | {'-' if row.psnr is None else f'{row.psnr:.0f} dB'} |" for row in rows
    ]
    lines += [
        "",
        "![grid: a row a scale, two images of each class](digits-guidance.png)",
        "",
        f"Scales {', '.join(f'{row.scale:g}' for row in rows)} from the top; two columns a class, a column a seed.",
        "",
        "## Inversion",
        "",
        f"{digits} held-out digits with their labels, encoded by DDIM inversion and decoded with as many steps.",
        "",
        "| steps | PSNR of what comes back |",
        "|---|---|",
        *(f"| {steps} | {value:.1f} dB |" for steps, value in inversion.items()),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure guidance and inversion on the digits model.")
    parser.add_argument("bundle", type=Path, help="of assets/digits.pt, exported with --classifier")
    parser.add_argument("--classifier", type=Path, default=CLASSIFIER)
    parser.add_argument("-n", type=int, default=100, help="images a scale (default 100, at least 20)")
    parser.add_argument("--compare", type=int, default=10, help="images a scale made by autograd too (default 10)")
    parser.add_argument("--invert", type=int, default=10, help="held-out digits inverted (default 10)")
    parser.add_argument("--out", type=Path, default=Path("docs/digits.md"), help="the page; the picture goes beside it")
    args = parser.parse_args()
    sampler = Sampler.open(args.bundle)
    network = load_checkpoint(
        args.classifier, family="openai-guided", image_size=(32, 32), num_head_channels=32, noise_schedule="cosine"
    ).classifier()
    graph, autograd = sampler.classifier_guidance().guide, AutogradGuide(network)
    rows, pictures = [], []
    for scale in SCALES:
        images = guided(sampler, graph, scale, args.n)
        again = guided(sampler, autograd, scale, args.compare) if scale else None
        same = None if again is None else psnr(images[: args.compare], again).whole
        rows.append(GuidedRow(scale, accuracy(images), same))
        pictures.append(images[torch.arange(2 * CLASSES) // 2 + CLASSES * (torch.arange(2 * CLASSES) % 2)])
        print(f"scale {scale:g}: {rows[-1].accuracy:.1%}, PSNR {same}", flush=True)
    inversion = {steps: inversion_psnr(sampler, args.invert, steps) for steps in INVERSION_STEPS}
    picture = args.out.with_name("digits-guidance.png")
    save_png(picture, grid(to_uint8(torch.cat(pictures)), columns=2 * CLASSES, enlarge=2))
    with atomic_path(args.out) as temporary:
        temporary.write_text(page(rows, args.n, args.compare, inversion, args.invert))
    print(args.out.read_text())


if __name__ == "__main__":
    main()
