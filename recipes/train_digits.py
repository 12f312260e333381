"""Train the shipped class-conditional digits model; run again to go on from the last state.

    python -m recipes.train_digits --work runs/digits --iterations 6000

Writes state.pt (resumes from it), log.csv and ema_0.999_<iterations>.pt, the EMA weights as a bare guided-diffusion
state dict. Objective: the hybrid of Improved DDPM (Nichol & Dhariwal, 2021, eq. 16) with a learned range; cosine
schedule (eq. 17), T = 1000.

The network predicts x0 (guided-diffusion's predict_xstart), because x0 is what a sampler divides by a small
alphas_cumprod otherwise: an error in eps that the loss hardly sees is a grey haze in the picture. The squared error is
weighted by the signal-to-noise ratio clipped to [1, 5], as in Salimans & Ho (2022), section 4, with the upper bound of
Hang et al. (2023).

--init FILE starts a new run (its own optimizer, warm-up and decay) from the weights of an earlier one.

The network runs eagerly on purpose. With torch 2.13 on a CPU in bfloat16, torch.compile gave it a backward pass whose
gradients for the whole way down were 0 (the forward pass was right), at the same speed.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint import load_checkpoint
from engine.likelihood import discretised_log_likelihood, gaussian_kl
from engine.schedule import cosine_schedule
from engine.unet import UNet
from recipes.digits_data import augment, load_split
from recipes.digits_net import digits_unet, init_weights
from recipes.openai_format import to_openai

STEPS = 1000
PEAK_LR, WARM_UP, EMA_RATE, LABEL_DROP, BATCH = 1e-3, 300, 0.999, 0.1, 32
SNR_WEIGHT = (1.0, 5.0)
LOG_EVERY, SAVE_EVERY = 100, 250


class Diffusion:
    """The cosine schedule's coefficients, [T] float32 from float64, and the training losses."""

    def __init__(self) -> None:
        schedule = cosine_schedule(STEPS)
        abar = schedule.alphas_cumprod

        def table(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).float()

        self.weight = table(np.clip(abar / (1 - abar), *SNR_WEIGHT))
        self.signal, self.noise = table(np.sqrt(abar)), table(np.sqrt(1 - abar))
        self.mean_x0, self.mean_xt = table(schedule.posterior_mean_x0), table(schedule.posterior_mean_xt)
        self.log_lower, self.log_upper = table(schedule.posterior_log_variance), table(np.log(schedule.betas))

    def losses(self, out: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted mean squared error of x0, and the variational term in bits a dimension (mean without gradient)."""

        def at(table: Tensor) -> Tensor:
            return table[t][:, None, None, None]

        prediction, v = out.float().chunk(2, dim=1)
        mse = (at(self.weight) * (x0 - prediction).square()).mean()
        mean = at(self.mean_x0) * x0 + at(self.mean_xt) * x_t
        mean_hat = at(self.mean_x0) * prediction.detach().clamp(-1, 1) + at(self.mean_xt) * x_t
        frac = (v + 1) / 2
        log_var = frac * at(self.log_upper) + (1 - frac) * at(self.log_lower)
        kl = gaussian_kl(mean, at(self.log_lower).expand_as(mean), mean_hat, log_var)
        nll = -discretised_log_likelihood(x0, mean_hat, 0.5 * log_var)
        return mse, torch.where(t[:, None, None, None] == 0, nll, kl).mean() / math.log(2.0)


def learning_rate(iteration: int, total: int) -> float:
    """Linear warm-up, then a cosine to zero at the last iteration."""
    if iteration < WARM_UP:
        return PEAK_LR * (iteration + 1) / WARM_UP
    return PEAK_LR * 0.5 * (1 + math.cos(math.pi * min(1.0, (iteration - WARM_UP) / (total - WARM_UP))))


def stratified_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """One timestep from each of `count` equal slices of [0, T), shuffled: less variance than independent draws."""
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (u * STEPS).long()[torch.randperm(count, generator=generator)]


def save_atomically(value: object, path: Path) -> None:
    torch.save(value, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def trim_log(path: Path, iteration: int) -> None:
    """Drop the lines of iterations that are about to be done again."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if int(line.split(",")[0]) <= iteration))


def initial_weights(model: UNet, init: Path | None) -> None:
    """Fresh weights, or those of a file that an earlier run wrote."""
    if init is None:
        init_weights(model)
        return
    earlier = load_checkpoint(
        init, family="openai-guided", image_size=(32, 32), num_head_channels=32, noise_schedule="cosine",
        prediction="x0", null_class=10,
    )  # fmt: skip
    model.load_state_dict(dict(earlier.weights))


def train(work: Path, total: int, init: Path | None, is_bf16: bool) -> None:
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    data = load_split()["train"]
    config = digits_unet()
    model = UNet(config)
    initial_weights(model, init)
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=1e-3)
    start, generator = 0, torch.Generator().manual_seed(1)
    if (work / "state.pt").exists():
        state = torch.load(work / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, start = state["ema"], state["iteration"]
        generator.set_state(state["generator"])
        trim_log(work / "log.csv", start)
    diffusion = Diffusion()
    sums, clock = np.zeros(2), time.monotonic()
    for iteration in range(start, total):
        rows = torch.randint(len(data.images), (BATCH,), generator=generator)
        x0 = data.images[rows]
        moved = augment(x0, generator, degrees=8, scale=0.08, shift=1.5)
        x0 = torch.where(torch.rand(BATCH, 1, 1, 1, generator=generator) < 0.7, moved, x0)
        y = torch.where(torch.rand(BATCH, generator=generator) < LABEL_DROP, 10, data.labels[rows])
        t, eps = stratified_timesteps(BATCH, generator), torch.randn(x0.shape, generator=generator)
        x_t = diffusion.signal[t][:, None, None, None] * x0 + diffusion.noise[t][:, None, None, None] * eps
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            out = model(x_t, t.float(), y)
        mse, bound = diffusion.losses(out, x0, x_t, t)
        optimizer.zero_grad(set_to_none=True)
        (mse + bound).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(iteration, total)
        optimizer.step()
        rate = min(EMA_RATE, (1 + iteration) / (10 + iteration))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.values()), list(model.state_dict().values()), 1 - rate)
        sums += mse.item(), bound.item()
        done = iteration + 1
        if done % LOG_EVERY == 0:
            seconds = (time.monotonic() - clock) / LOG_EVERY
            with (work / "log.csv").open("a") as log:
                log.write(f"{done},{sums[0] / LOG_EVERY:.6f},{sums[1] / LOG_EVERY:.6f},{seconds:.4f}\n")
            sums, clock = np.zeros(2), time.monotonic()
        if done % SAVE_EVERY == 0 or done == total:
            save_atomically(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema,
                 "iteration": done, "generator": generator.get_state()}, work / "state.pt",
            )  # fmt: skip
    save_atomically(to_openai(ema, config), work / f"ema_{EMA_RATE}_{total:06d}.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the shipped digits diffusion model.")
    parser.add_argument("--work", type=Path, default=Path("runs/digits"), help="folder of state, log and result")
    parser.add_argument("--iterations", type=int, default=6000, help="length of the whole run, resumed parts included")
    parser.add_argument("--init", type=Path, help="start from these weights where the folder has no state yet")
    parser.add_argument("--fp32", action="store_true", help="for a CPU without bfloat16 instructions")
    args = parser.parse_args()
    train(args.work, args.iterations, args.init, not args.fp32)


if __name__ == "__main__":
    main()
