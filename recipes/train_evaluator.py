"""Train the evaluator on the digits that the diffusion model never sees.

    python -m recipes.train_evaluator --out assets/evaluator.safetensors

Writes the weights and, beside them, evaluator_log.csv. `--validate` trains three times on two thirds of the
evaluator part and reads the other third instead: the settings below were chosen so. The held-out part is read
once, at the end of the real training, and decides nothing.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from engine.files import atomic_path
from judging.digits import Digits, load_split
from judging.evaluator import Evaluator, read_digits
from recipes.augmentation import augment

ITERATIONS, BATCH = 3000, 64
PEAK_LR, WEIGHT_DECAY, LABEL_SMOOTHING = 3e-3, 2e-2, 0.05
DEGREES, SCALE, SHIFT, ELASTIC = 12.0, 0.15, 2.5, 2.0
LOG_EVERY, FOLDS = 100, 3


@dataclass(frozen=True, slots=True)
class LogRow:
    """Means since the row before; held_out_accuracy only in the last row."""

    iteration: int
    loss: float
    train_accuracy: float
    held_out_accuracy: float | None = None


def elastic(images: Tensor, generator: torch.Generator, pixels: float) -> Tensor:
    """Smooth random displacement of each image [B, 1, 32, 32]; black outside.

    A 5x5 field of uniform displacements of up to `pixels`, interpolated bicubically: a cheap form of the
    elastic distortion of Simard et al., Best Practices for Convolutional Neural Networks (2003).
    """
    coarse = (torch.rand(len(images), 2, 5, 5, generator=generator) * 2 - 1) * (pixels * 2 / 32)
    field = F.interpolate(coarse, size=(32, 32), mode="bicubic", align_corners=True)
    identity = F.affine_grid(torch.eye(2, 3).expand(len(images), 2, 3), list(images.shape), align_corners=False)
    moved = F.grid_sample(images + 1, identity + field.permute(0, 2, 3, 1), mode="bicubic", align_corners=False)
    return (moved - 1).clamp(-1, 1)


def train(data: Digits, seed: int) -> tuple[Evaluator, list[LogRow]]:
    """One training with every random choice drawn from the seed; AdamW under a one-cycle learning rate."""
    torch.manual_seed(seed)  # initial weights and dropout
    generator = torch.Generator().manual_seed(seed)
    model = Evaluator().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=ITERATIONS, pct_start=0.15)
    rows: list[LogRow] = []
    loss_sum, correct = 0.0, 0
    order = torch.empty(0, dtype=torch.int64)
    for done in tqdm(range(1, ITERATIONS + 1), disable=None):
        if len(order) < BATCH:
            order = torch.randperm(len(data.images), generator=generator)
        chosen, order = order[:BATCH], order[BATCH:]
        labels = data.labels[chosen]
        images = elastic(data.images[chosen], generator, ELASTIC)
        images = augment(images, generator, DEGREES, SCALE, SHIFT)
        logits = model(images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        cycle.step()
        loss_sum += loss.item()
        correct += int((logits.argmax(dim=1) == labels).sum())
        if done % LOG_EVERY == 0:
            rows.append(LogRow(done, loss_sum / LOG_EVERY, correct / (LOG_EVERY * BATCH)))
            loss_sum, correct = 0.0, 0
    return model.eval().requires_grad_(False), rows


def accuracy(model: Evaluator, data: Digits) -> float:
    logits, _ = read_digits(model, data.images)
    return float((logits.argmax(dim=1) == data.labels).double().mean())


def validate(data: Digits) -> list[float]:
    """Accuracy on each third of the data after training on the other two."""
    fold = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0)) % FOLDS
    scores = []
    for k in range(FOLDS):
        inside, outside = fold != k, fold == k
        model, _ = train(Digits(data.images[inside], data.labels[inside]), seed=k)
        scores.append(accuracy(model, Digits(data.images[outside], data.labels[outside])))
        print(f"fold {k}: {scores[-1]:.4f} of {int(outside.sum())} digits", flush=True)
    return scores


def write_log(path: Path, rows: list[LogRow]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(LogRow.__dataclass_fields__)
        for row in rows:
            last = "" if row.held_out_accuracy is None else f"{row.held_out_accuracy:.4f}"
            writer.writerow([row.iteration, f"{row.loss:.5f}", f"{row.train_accuracy:.4f}", last])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the CNN that reads the sampled digits.")
    parser.add_argument("--out", type=Path, default=Path("assets/evaluator.safetensors"), help="file of the weights")
    parser.add_argument("--validate", action="store_true", help="cross-validate the settings; write nothing")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    parts = load_split()
    if args.validate:
        scores = validate(parts["evaluator"])
        print(f"mean of {FOLDS} folds: {sum(scores) / FOLDS:.4f}")
        return
    model, rows = train(parts["evaluator"], seed=0)
    read = accuracy(model, parts["held_out"])
    rows[-1] = LogRow(rows[-1].iteration, rows[-1].loss, rows[-1].train_accuracy, read)
    with atomic_path(args.out) as temporary:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, temporary)
    write_log(args.out.with_name(f"{args.out.stem}_log.csv"), rows)
    print(f"{args.out}: reads {read:.2%} of the {len(parts['held_out'].images)} held-out digits")


if __name__ == "__main__":
    main()
