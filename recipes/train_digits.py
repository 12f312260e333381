"""Train the shipped class-conditional digits model; run again to go on from the last state.

    python -m recipes.train_digits --work runs/digits --iterations 6000

Writes state.pt (resumes from it), log.csv and ema_0.999_<iterations>.pt, the EMA weights as a bare guided-diffusion
state dict. Objective: the hybrid of Improved DDPM (Nichol & Dhariwal, 2021, eq. 16) with a learned range; cosine
schedule (eq. 17), T = 1000.

The network predicts x0 (guided-diffusion's predict_xstart), because x0 is what a sampler divides by a small
alphas_cumprod otherwise: an error in eps that the loss hardly sees is a grey haze in the picture. The squared error is
weighted by the signal-to-noise ratio clipped to [1, 5], as in Salimans & Ho (2022), section 4, with the upper bound of
Hang et al. (2023).

The variational term trains the variance for chains of 1000, 250 and 50 steps by turns: of single steps of 1000 alone
the two bounds of the range nearly coincide, and what is learned there overshoots by far in a chain of fewer steps.

A quarter of each batch is of the last 20 timesteps: what is wrong there stays in the picture as it is.

--init FILE starts a new run (its own optimizer, warm-up and decay) from the weights of an earlier one, and
--forget-variance learns the variance anew. With --teacher FILE the network learns, in place of x0, what that one
predicts with classifier-free guidance of scale 1 + W (--guide): stage one of Meng et al., On Distillation of Guided
Diffusion Models (2023). One call then follows its label as two did.

The network runs eagerly on purpose. With torch 2.13 on a CPU in bfloat16, torch.compile gave it a backward pass whose
gradients for the whole way down were 0 (the forward pass was right), at the same speed.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.backends.native.native_backend import count_cores
from engine.checkpoints.load import load_checkpoint
from engine.diffusion.schedule import cosine_schedule
from engine.networks.unet import UNet
from engine.sampling.likelihood import discretised_log_likelihood, gaussian_kl
from judging.digits import FACTS, NULL_CLASS, load_split
from recipes.augmentation import augment
from recipes.digits_net import digits_unet, init_weights
from recipes.openai_format import to_openai

STEPS = 1000
PEAK_LR, WARM_UP, EMA_RATE, LABEL_DROP, BATCH = 1e-3, 300, 0.999, 0.1, 32
SNR_WEIGHT = (1.0, 5.0)
STRIDES, LAST_TIMESTEPS = (1, 4, 20), 20
LOG_EVERY, SAVE_EVERY = 100, 250


class Diffusion:
    """The cosine schedule's coefficients, [T] float32 from float64, and the training losses."""

    def __init__(self) -> None:
        schedule = cosine_schedule(STEPS)
        self.abar = torch.from_numpy(schedule.alphas_cumprod)
        self.first_log_lower = float(schedule.posterior_log_variance[0])
        self.weight = (self.abar / (1 - self.abar)).clamp(*SNR_WEIGHT).float()
        self.signal, self.noise = self.abar.sqrt().float(), (1 - self.abar).sqrt().float()

    def posterior(self, t: Tensor, stride: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of x at t - stride (0 at the least), given x_t and x0: factors of x0 and x_t, log bounds of the variance.

        t, stride: [B] int64; returns four of [B, 1, 1, 1] float32. Ho et al. (2020), eq. 7, for a chain of those two
        timesteps; t = 0 goes to the image itself.
        """
        now, before = self.abar[t], self.abar[(t - stride).clamp(min=0)]
        before = torch.where(t == 0, 1.0, before)
        beta = 1 - now / before
        variance = beta * (1 - before) / (1 - now)
        log_lower = torch.where(t == 0, self.first_log_lower, variance.clamp(min=1e-20).log())
        parts = (
            before.sqrt() * beta / (1 - now),
            (now / before).sqrt() * (1 - before) / (1 - now),
            log_lower,
            beta.log(),
        )
        x0_part, xt_part, lower, upper = (part.float()[:, None, None, None] for part in parts)
        return x0_part, xt_part, lower, upper

    def losses(
        self, out: Tensor, target: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, stride: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weighted mean squared error to the target, and the variational term in bits a dimension.

        The term is of the step of `stride` that ends in t, and the mean takes no gradient from it.
        """
        prediction, v = out.float().chunk(2, dim=1)
        mse = (self.weight[t][:, None, None, None] * (target - prediction).square()).mean()
        x0_part, xt_part, log_lower, log_upper = self.posterior(t, stride)
        mean = x0_part * x0 + xt_part * x_t
        mean_hat = x0_part * prediction.detach().clamp(-1, 1) + xt_part * x_t
        frac = (v + 1) / 2
        log_var = frac * log_upper + (1 - frac) * log_lower
        kl = gaussian_kl(mean, log_lower.expand_as(mean), mean_hat, log_var)
        nll = -discretised_log_likelihood(x0, mean_hat, 0.5 * log_var)
        return mse, torch.where(t[:, None, None, None] == 0, nll, kl).mean() / math.log(2.0)


def learning_rate(iteration: int, total: int, peak: float) -> float:
    """Linear warm-up, then a cosine to zero at the last iteration."""
    warm_up = min(WARM_UP, total // 10)
    if iteration < warm_up:
        return peak * (iteration + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (iteration - warm_up) / (total - warm_up))))


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


def read_weights(path: Path) -> dict[str, Tensor]:
    """The U-Net's weights in a file that an earlier run wrote."""
    earlier = load_checkpoint(path, **FACTS)
    return dict(earlier.weights)


@dataclass(frozen=True, slots=True)
class Run:
    """What a run is. teacher: None learns x0, a file what its weights predict with guidance of scale 1 + guide."""

    iterations: int
    peak_lr: float
    is_bf16: bool
    init: Path | None
    forget_variance: bool
    teacher: Path | None
    guide: float


def start_model(run: Run) -> UNet:
    """Fresh weights, or those of an earlier run."""
    model = UNet(digits_unet())
    if run.init is None:
        init_weights(model)
        return model
    model.load_state_dict(read_weights(run.init))
    if run.forget_variance:
        with torch.no_grad():
            for parameter in list(model.parameters())[-2:]:
                parameter[1].zero_()
    return model


class Forward:
    """A network's prediction and variance, of which the variance trains its own weights in the last layer alone.

    At the last timesteps the variational term is large, and its gradient would take the whole network with it.
    """

    def __init__(self, model: UNet) -> None:
        self.model, self.last = model, model.blocks[-1]
        self.features = torch.empty(0)
        self.last.register_forward_pre_hook(self._keep)

    def _keep(self, _module: object, inputs: tuple[Tensor, ...]) -> None:
        self.features = inputs[0]

    def __call__(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out = self.model(x_t, t.float(), y)
        return torch.cat([out[:, :1], self.last(self.features.detach())[:, 1:]], dim=1)


@torch.no_grad()
def guided_target(teacher: UNet, guide: float, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """x0 by classifier-free guidance (Ho & Salimans, 2022, eq. 6) of scale 1 + guide, 1 where y is NULL_CLASS."""
    labelled, unlabelled = (teacher(x_t, t.float(), label)[:, :1] for label in (y, torch.full_like(y, NULL_CLASS)))
    return labelled + guide * (labelled - unlabelled)


def train(work: Path, run: Run) -> None:
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(count_cores())
    torch.manual_seed(0)
    data, total = load_split()["train"], run.iterations
    model = start_model(run)
    teacher = None
    if run.teacher is not None:
        teacher = UNet(digits_unet())
        teacher.load_state_dict(read_weights(run.teacher))
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.peak_lr, betas=(0.9, 0.99), weight_decay=1e-3)
    start, generator = 0, torch.Generator().manual_seed(1)
    if (work / "state.pt").exists():
        state = torch.load(work / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, start = state["ema"], state["iteration"]
        generator.set_state(state["generator"])
        trim_log(work / "log.csv", start)
    diffusion, forward = Diffusion(), Forward(model)
    sums, clock = np.zeros(2), time.monotonic()
    for iteration in range(start, total):
        rows = torch.randint(len(data.images), (BATCH,), generator=generator)
        x0 = data.images[rows]
        moved = augment(x0, generator, degrees=8, scale=0.08, shift=1.5)
        x0 = torch.where(torch.rand(BATCH, 1, 1, 1, generator=generator) < 0.7, moved, x0)
        y = torch.where(torch.rand(BATCH, generator=generator) < LABEL_DROP, NULL_CLASS, data.labels[rows])
        t, eps = stratified_timesteps(BATCH, generator), torch.randn(x0.shape, generator=generator)
        t[::4] %= LAST_TIMESTEPS
        x_t = diffusion.signal[t][:, None, None, None] * x0 + diffusion.noise[t][:, None, None, None] * eps
        stride = torch.tensor(STRIDES)[torch.randint(len(STRIDES), (BATCH,), generator=generator)]
        with torch.autocast("cpu", torch.bfloat16, enabled=run.is_bf16):
            target = x0 if teacher is None else guided_target(teacher, run.guide, x_t, t, y)
            out = forward(x_t, t, y)
        mse, bound = diffusion.losses(out, target, x0, x_t, t, stride)
        optimizer.zero_grad(set_to_none=True)
        (mse + bound).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(iteration, total, run.peak_lr)
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
    save_atomically(to_openai(ema, model.config), work / f"ema_{EMA_RATE}_{total:06d}.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the shipped digits diffusion model.")
    parser.add_argument("--work", type=Path, default=Path("runs/digits"), help="folder of state, log and result")
    parser.add_argument("--iterations", type=int, default=6000, help="length of the whole run, resumed parts included")
    parser.add_argument("--init", type=Path, help="start from these weights where the folder has no state yet")
    parser.add_argument("--fp32", action="store_true", help="for a CPU without bfloat16 instructions")
    parser.add_argument("--forget-variance", action="store_true", help="learn the variance of --init's weights anew")
    parser.add_argument("--teacher", type=Path, help="learn what these weights predict with guidance, in place of x0")
    parser.add_argument("--guide", type=float, default=0.5, metavar="W", help="guidance of scale 1 + W (default 0.5)")
    parser.add_argument(
        "--peak-lr", type=float, default=PEAK_LR, help=f"learning rate after warm-up (default {PEAK_LR})"
    )
    args = parser.parse_args()
    train(
        args.work,
        Run(
            args.iterations, args.peak_lr, not args.fp32, args.init, args.forget_variance, args.teacher, args.guide
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()
