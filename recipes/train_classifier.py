"""Train the shipped noise-conditioned classifier on the diffusion model's training digits.

    python -m recipes.train_classifier --out assets/classifier.pt

Writes the weights as a bare guided-diffusion state dict and, beside them, classifier_log.csv. Cross-entropy
on x_t at uniform t under the diffusion model's own schedule, as in Dhariwal & Nichol, Diffusion Models Beat
GANs (2021), section 4. The held-out digits are read once, at the end.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from engine.files import atomic_path
from engine.networks.classifier import Classifier
from judging.digits import Digits, load_split
from recipes.augmentation import augment
from recipes.classifier_net import digits_classifier, init_classifier
from recipes.openai_format import to_openai
from recipes.train_digits import Diffusion, stratified_timesteps

BATCH, PEAK_LR, WARM_UP, WEIGHT_DECAY, MAX_NORM = 64, 1e-3, 200, 0.05, 1.0
LOG_EVERY = 100
HELD_OUT_TIMESTEPS = (0, 250, 500, 750)


def add_noise(diffusion: Diffusion, x0: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
    """x_t [B, 1, H, W] from x0 at t [B] int64; DDPM (Ho et al., 2020), eq. 4."""
    eps = torch.randn(x0.shape, generator=generator)
    return diffusion.signal[t][:, None, None, None] * x0 + diffusion.noise[t][:, None, None, None] * eps


def learning_rate(iteration: int, total: int) -> float:
    """Linear warm-up, then a cosine to zero at the last iteration."""
    warm = min(1.0, (iteration + 1) / WARM_UP)
    return PEAK_LR * warm * 0.5 * (1 + math.cos(math.pi * iteration / total))


def train(data: Digits, total: int, seed: int) -> tuple[Classifier, list[list[str]]]:
    """The trained classifier and its log: iteration, loss, accuracy on x_t, seconds an iteration."""
    torch.manual_seed(seed)  # initial weights
    generator = torch.Generator().manual_seed(seed)
    model = Classifier(digits_classifier())
    init_classifier(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    diffusion = Diffusion()
    rows: list[list[str]] = []
    loss_sum, correct, clock = 0.0, 0, time.monotonic()
    for iteration in tqdm(range(total), disable=None):
        chosen = torch.randint(len(data.images), (BATCH,), generator=generator)
        x0 = augment(data.images[chosen], generator, degrees=10, scale=0.1, shift=2)
        t, labels = stratified_timesteps(BATCH, generator), data.labels[chosen]
        x_t = add_noise(diffusion, x0, t, generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x_t, t.float()).float()
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(iteration, total)
        optimizer.step()
        loss_sum += loss.item()
        correct += int((logits.argmax(dim=1) == labels).sum())
        done = iteration + 1
        if done % LOG_EVERY == 0:
            seconds = (time.monotonic() - clock) / LOG_EVERY
            accuracy = correct / (LOG_EVERY * BATCH)
            rows.append([str(done), f"{loss_sum / LOG_EVERY:.5f}", f"{accuracy:.4f}", f"{seconds:.3f}"])
            loss_sum, correct, clock = 0.0, 0, time.monotonic()
    return model.eval().requires_grad_(False), rows


@torch.inference_mode()
def accuracy_at(model: Classifier, data: Digits, timestep: int) -> float:
    """Share of the digits read right in fp32 from one noising each at the timestep."""
    generator = torch.Generator().manual_seed(timestep)
    t = torch.full((len(data.images),), timestep)
    x_t = add_noise(Diffusion(), data.images, t, generator)
    logits = torch.cat([model(x, s) for x, s in zip(x_t.split(100), t.float().split(100), strict=True)])
    return float((logits.argmax(dim=1) == data.labels).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the noise-conditioned digit classifier.")
    parser.add_argument("--out", type=Path, default=Path("assets/classifier.pt"), help="file of the weights")
    parser.add_argument("--iterations", type=int, default=4000, help="length of the training")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    parts = load_split()
    model, rows = train(parts["train"], args.iterations, seed=0)
    with atomic_path(args.out) as temporary:
        torch.save(to_openai(model.state_dict(), model.config), temporary)
    read = [accuracy_at(model, parts["held_out"], t) for t in HELD_OUT_TIMESTEPS]
    columns = [f"held_out_accuracy_t{t}" for t in HELD_OUT_TIMESTEPS]
    log = args.out.with_name(f"{args.out.stem}_log.csv")
    with atomic_path(log) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["iteration", "loss", "accuracy", "seconds", *columns])
        writer.writerows(row + [""] * len(read) for row in rows[:-1])
        writer.writerows(row + [f"{value:.4f}" for value in read] for row in rows[-1:])
    for t, value in zip(HELD_OUT_TIMESTEPS, read, strict=True):
        print(f"t = {t}: reads {value:.1%} of the {len(parts['held_out'].images)} held-out digits")


if __name__ == "__main__":
    main()
