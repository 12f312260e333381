"""Images from a bundle: requests are put into slots, and a slot that empties goes to the next request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.backends import Backend, open_backend
from engine.bundle import Bundle
from engine.errors import RequestError
from engine.guidance import ClassifierFreeGuidance, ClassifierGuidance
from engine.noise import NoiseSource, normal
from engine.prediction import Variance
from engine.requests import Labels, make_requests, resize_condition
from engine.slots import Request, Slots, Step
from engine.solvers import Steps, StepTable, ddim_table, ddpm_table, dpmpp_table

__all__ = ["Labels", "Request", "Sampler", "Slots", "Step", "resize_condition"]


class Sampler:
    """Images from a bundle: opens a backend once and runs requests through its slots."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.config = backend.manifest.config
        self.diffusion = backend.manifest.diffusion

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle,
        backend: str = "auto",
        precision: str | None = None,
        threads: int | None = None,
    ) -> Sampler:
        """Open a bundle; see engine.open_backend for the arguments and errors."""
        return cls(open_backend(bundle, backend, precision, threads))

    def close(self) -> None:
        """Release the backend."""
        self.backend.close()

    def sample(
        self,
        n: int,
        *,
        steps: Steps = 50,
        sampler: str = "ddim",
        eta: float = 0.0,
        variance: Variance | None = None,
        labels: Labels | None = None,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        guidance: ClassifierGuidance | None = None,
        cfg_scale: float | ClassifierFreeGuidance = 1.0,
        cond: Tensor | None = None,
        noise: NoiseSource = normal,
        batch_size: int = 16,
    ) -> Tensor:
        """n images, float32 [n, C, H, W] in [-1, 1].

        steps: how many, or a respacing string such as "10,10,10" or "ddim50". sampler: "ddim" (with eta), "dpmpp" or
        "ddpm" (with variance, the checkpoint's own unless given). labels: one class for all, or [n]; None draws one
        from each seed. seed: image i has seed + i; seeds: [n] instead. guidance: by a classifier. cfg_scale: of
        classifier-free guidance, out = without_label + cfg_scale (with_label - without_label), 1 for none; or a
        ClassifierFreeGuidance. cond: [n, Cc, h, w], resized bilinearly where it is smaller than the image. noise: a
        source to use instead of Philox, e.g. engine.noise.RecordedNoise. batch_size: images in progress at a time; it
        never changes an image. Raises RequestError.
        """
        table = self.table(steps, sampler, eta, variance)
        requests = self.requests(n, table, labels, seed, seeds, guidance, cond, cfg_scale)
        images = torch.empty(n, self.config.in_channels, *self.config.image_size)
        for step in self.run(requests, guidance, noise, batch_size):
            if step.is_last:
                images[step.request.index] = step.x_prev.clamp(-1, 1)
        return images

    def table(self, steps: Steps, sampler: str, eta: float = 0.0, variance: Variance | None = None) -> StepTable:
        """The table of a named sampler on this checkpoint's schedule; raises RequestError for an unknown name."""
        if sampler == "ddpm":
            if eta:
                raise RequestError("eta belongs to ddim; ddpm has its own variance")
            return ddpm_table(self.diffusion, steps, variance)
        if sampler == "ddim":
            if variance is not None:
                raise RequestError("variance belongs to ddpm; the noise of ddim is set by eta")
            return ddim_table(self.diffusion, steps, eta)
        if sampler == "dpmpp":
            if eta or variance is not None:
                raise RequestError("dpmpp adds no noise; leave eta and variance out")
            return dpmpp_table(self.diffusion, steps)
        raise RequestError(f"unknown sampler {sampler!r}; known: ddim, ddpm, dpmpp")

    def requests(
        self,
        n: int,
        table: StepTable,
        labels: Labels | None = None,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        guidance: ClassifierGuidance | None = None,
        cond: Tensor | None = None,
        cfg_scale: float | ClassifierFreeGuidance = 1.0,
    ) -> list[Request]:
        """The n requests of sample(), checked; see there."""
        return make_requests(
            self.config,
            n,
            table,
            labels=labels,
            seed=seed,
            seeds=seeds,
            guidance=guidance,
            cond=cond,
            cfg_scale=cfg_scale,
        )

    def run(
        self,
        requests: Iterable[Request],
        guidance: ClassifierGuidance | None = None,
        noise: NoiseSource = normal,
        batch_size: int = 16,
    ) -> Iterator[Step]:
        """Every step of every request, as they happen; a finished image's slot goes to the next request."""
        if batch_size < 1:
            raise RequestError(f"batch_size is {batch_size}; expected 1 or more")
        if guidance is not None:
            self._check_guide(guidance)
        waiting = iter(requests)
        slots = Slots(self.backend, batch_size, guidance, noise)
        while True:
            for slot in slots.free:
                request = next(waiting, None)
                if request is None:
                    break
                slots.enter(slot, request)
            if slots.is_empty:
                return
            yield from slots.step()

    def _check_guide(self, guidance: ClassifierGuidance) -> None:
        config = guidance.guide.config
        if (config.in_channels, config.image_size) != (self.config.in_channels, self.config.image_size):
            raise RequestError(
                f"the classifier reads {config.in_channels} channels of {config.image_size}, the network makes "
                f"{self.config.in_channels} of {self.config.image_size}; use the classifier trained for it"
            )
