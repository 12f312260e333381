"""Images from a bundle: requests are put into slots, and a slot that empties goes to the next request."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from engine.backends.protocol import Backend
from engine.backends.registry import open_backend, open_guide
from engine.bundle.folder import Bundle
from engine.diffusion.guidance import ClassifierFreeGuidance, ClassifierGuidance
from engine.diffusion.noise import NOISE, NoiseSource, normal
from engine.diffusion.prediction import Diffusion, Variance
from engine.diffusion.repaint import with_jumps
from engine.diffusion.solvers import (
    Steps,
    StepTable,
    ddim_inversion_table,
    ddim_table,
    ddpm_table,
    dpmpp_table,
    plms_table,
    starting_level,
)
from engine.errors import RequestError
from engine.networks.inputs import Conditions
from engine.sampling.likelihood import variational_bound
from engine.sampling.options import Options, Plan, Preview, Progress, deterministic, great_circle, previews
from engine.sampling.pool import SlotPool
from engine.sampling.requests import Labels, make_requests, resize_condition
from engine.sampling.slots import Request, Slots, Step, label_tensor

__all__ = ["Labels", "Request", "Sampler", "Slots", "Step", "resize_condition"]


class Sampler:
    """Images from a bundle: opens a backend once and runs requests through its slots.

    backend: what runs the network; Sampler.open opens one. bundle: where it came from, for its classifier. threads: CPU
    threads of that classifier, None for all cores.
    """

    def __init__(self, backend: Backend, bundle: Bundle | None = None, threads: int | None = None) -> None:
        self.backend, self._bundle, self._threads = backend, bundle, threads
        self._pool = SlotPool(backend)
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
        """Open a bundle; see engine.open_backend for the errors.

        bundle: its folder. backend: "auto", or the name of one. precision: None for the backend's default. threads: CPU
        threads, None for all cores.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        return cls(open_backend(opened, backend, precision, threads), opened, threads)

    def classifier_guidance(self, scale: float = 1.0) -> ClassifierGuidance:
        """Guidance of strength scale by the bundle's own classifier, whose gradient was exported as a graph.

        The graph runs in the backend's library where it can (see engine.backends.registry.open_guide); torch autograd
        is not used. Raises BundleError where the bundle holds no classifier, RequestError where no bundle was opened.
        """
        if self._bundle is None:
            raise RequestError("this sampler was made without a bundle; use Sampler.open, or pass guidance of your own")
        guide = open_guide(self._bundle, self.backend.name, self.backend.precision, self._threads, self.backend)
        return ClassifierGuidance(guide, scale)

    def close(self) -> None:
        """Release the backend."""
        self._pool.close()
        self.backend.close()

    def sample(self, n: int, **options: Unpack[Options]) -> Tensor:
        """n images, float32 [n, C, H, W] in [-1, 1].

        steps: how many (50), or a respacing string such as "10,10,10" or "ddim50". sampler: "ddim" (with eta),
        "dpmpp", "plms" or "ddpm" (with variance, the checkpoint's own unless given). labels: one class for all, or
        [n]; None draws one from each seed. seed: image i has seed + i; seeds: [n] instead. guidance: by a classifier.
        cfg_scale: of classifier-free guidance, out = without_label + cfg_scale (with_label - without_label), 1 for
        none; or a ClassifierFreeGuidance. cond: [n, Cc, h, w], resized bilinearly where it is smaller than the image.
        noise: a source to use instead of Philox, e.g. engine.diffusion.noise.RecordedNoise. batch_size: images in
        progress at a time (16); it never changes an image. Raises RequestError.
        """
        return self._finish(self._plan(n, **options))

    def stream(self, n: int, **options: Unpack[Options]) -> Iterator[Preview]:
        """What sample(n) makes, step by step: after each step of each image its x0 so far, and at the end the image.

        Images come as their slots do: up to batch_size in turn. Bad options raise RequestError at the call.
        """
        return previews(self._run(self._plan(n, **options)))

    def progressive(self, n: int, **options: Unpack[Options]) -> Progress:
        """Every step of n images: x after the step and the x0 it went by, each [n, steps, C, H, W] float32."""
        plan = self._plan(n, **options)
        shape = (n, len(plan.requests[0].table), *self._shape)
        progress, taken = Progress(torch.empty(shape), torch.empty(shape)), [0] * n
        for step in self._run(plan):
            image = step.request.index
            progress.x[image, taken[image]], progress.x0[image, taken[image]] = step.x_prev, step.x0
            taken[image] += 1
        return progress

    def interpolate(self, first_seed: int, second_seed: int, n: int, **options: Unpack[Options]) -> Tensor:
        """n images from that of first_seed to that of second_seed, both included, [n, C, H, W]; n is 2 or more.

        The start noises lie on a great circle, at equal angles: Song et al., DDIM (2021), appendix D.5. labels, where
        None, are drawn from the first seed. Raises RequestError for a sampler that adds noise.
        """
        if n < 2:
            raise RequestError(f"n is {n}; expected 2 or more images to interpolate")
        if options.get("seed") is not None or options.get("seeds") is not None:
            raise RequestError("interpolate has its two seeds; leave seed and seeds out")
        plan = self._plan(n, **(options | {"seeds": [first_seed] * n}))
        if plan.requests[0].table.S.any():
            raise RequestError("images between two seeds need a sampler without noise: ddim with eta 0, dpmpp or plms")
        ends = torch.from_numpy(plan.noise([first_seed, second_seed], [0, 0], self._shape, NOISE))
        weights = torch.linspace(0, 1, n, dtype=torch.float64).tolist()
        return self._finish(plan.starting_at([great_circle(ends[0], ends[1], w) for w in weights]))

    def encode(self, images: Tensor, **options: Unpack[Options]) -> Tensor:
        """The noise [n, C, H, W] float32 that decode() turns into these images, by DDIM inversion with eta 0.

        images: [n, C, H, W] in [-1, 1]. labels: as decode() is to use them; None is the null class, and an error
        where the network has labels but no null class. Of the options steps, labels, guidance, cfg_scale, cond and
        batch_size apply. Song et al., DDIM (2021), section 4.3. Raises RequestError.
        """
        starts = self._images(images)
        plan = self._plan(len(starts), **self._unlabelled(deterministic(options, "encode")))
        diffusion = self._diffusion(_is_plus_plus(options.get("cfg_scale", 1.0)))
        table = ddim_inversion_table(diffusion, options.get("steps", 50))
        requests = [dataclasses.replace(r, table=table) for r in plan.requests]
        return self._raw(dataclasses.replace(plan, requests=requests).starting_at(starts))

    def decode(self, x_T: Tensor, **options: Unpack[Options]) -> Tensor:
        """Images [n, C, H, W] in [-1, 1] of start noise x_T [n, C, H, W], by DDIM with eta 0; see encode()."""
        starts = self._images(x_T, is_noise=True)
        plan = self._plan(len(starts), **self._unlabelled(deterministic(options, "decode")))
        return self._finish(plan.starting_at(starts))

    def img2img(self, images: Tensor, strength: float = 0.5, **options: Unpack[Options]) -> Tensor:
        """Variations of images [n, C, H, W] in [-1, 1]: noised part of the way, then denoised; Meng et al., SDEdit.

        strength: share of the steps that is run, in (0, 1], at least one. The noise is draw 0 of each seed. Raises
        RequestError.
        """
        known = self._images(images)
        if not 0 < strength <= 1:
            raise RequestError(f"strength is {strength}; expected a number above 0, at most 1")
        plan = self._plan(len(known), **options)
        whole = plan.requests[0].table
        table = whole.last(max(1, round(strength * len(whole))))
        abar = starting_level(self.diffusion, table)
        seeds = [r.seed for r in plan.requests]
        z = torch.from_numpy(plan.noise(seeds, [0] * len(seeds), self._shape, NOISE))
        requests = [dataclasses.replace(r, table=table) for r in plan.requests]
        starts = math.sqrt(abar) * known + math.sqrt(1 - abar) * z
        return self._finish(dataclasses.replace(plan, requests=requests).starting_at(starts))

    def inpaint(
        self, images: Tensor, mask: Tensor, *, jump_length: int = 1, resamplings: int = 1, **options: Unpack[Options]
    ) -> Tensor:
        """images [n, C, H, W] in [-1, 1] with the part where mask is 1 made anew, to fit the rest.

        mask: [H, W], [C, H, W], or [n, 1 or C, H, W] of numbers from 0 (kept) to 1 (made). Lugmayr et al., RePaint
        (2022), eq. 8: after every step the kept part is the image, noised to that step's level. resamplings: how often
        each stretch of jump_length steps is done, with noise put back between (algorithm 1; 10 of length 10 in the
        paper); 1 does it once. Raises RequestError, also for resamplings with a learned variance or with dpmpp or plms.
        """
        known = self._images(images)
        try:
            whole = mask.float().expand(known.shape)
        except RuntimeError as error:
            raise RequestError(f"mask has shape {tuple(mask.shape)}; expected one for {tuple(known.shape)}") from error
        if not bool(((whole >= 0) & (whole <= 1)).all()):
            raise RequestError("mask holds values outside 0 (kept) to 1 (made)")
        plan = self._plan(len(known), **options)
        table = with_jumps(self.diffusion, plan.requests[0].table, jump_length, resamplings)
        requests = [
            dataclasses.replace(r, table=table, known=known[r.index], mask=whole[r.index]) for r in plan.requests
        ]
        return self._finish(dataclasses.replace(plan, requests=requests))

    def nll(
        self, images: Tensor, *, steps: Steps | None = None, labels: Labels | None = None, cond: Tensor | None = None,
        seed: int = 0, batch_size: int = 16,
    ) -> Tensor:  # fmt: skip
        """The variational bound of images [n, C, H, W] in [-1, 1] in bits per dimension, [n]; lower is likelier.

        steps: all of training's unless given. labels: None is the null class. cond: as in sample(). batch_size: images
        of one call of the network. The noise of image i is that of seed
        seed + i. Improved DDPM (2021), eq. 4 to 7, as OpenAI's code evaluates it. Raises RequestError.
        """
        x0 = self._images(images)
        self._check_run(None, batch_size)
        if self.config.self_condition:
            raise RequestError("the bound takes each step by itself; this network is given the x0 of the step before")
        table = ddim_table(self.diffusion, 1)
        given = self._unlabelled({"labels": labels})["labels"]
        made = self.requests(len(x0), table, given, seed, cond=cond)
        totals = []
        for first in range(0, len(made), batch_size):
            part = made[first : first + batch_size]
            label = label_tensor(self.config, part)
            conds = torch.stack([r.cond for r in part if r.cond is not None]) if cond is not None else None
            terms = variational_bound(
                self.backend,
                x0[first : first + batch_size],
                len(self.diffusion.schedule) if steps is None else steps,
                conditions=Conditions(label, conds),
                seeds=[r.seed for r in part],
            )
            totals.append(terms.total)
        return torch.cat(totals)

    def table(
        self,
        steps: Steps,
        sampler: str,
        eta: float = 0.0,
        variance: Variance | None = None,
        plus_plus: bool = False,
    ) -> StepTable:
        """The table of a named sampler on this checkpoint's schedule; raises RequestError for an unknown name.

        steps, eta, variance: as in sample(). plus_plus: for classifier-free guidance in the form of CFG++, which is one
        of ddim.
        """
        if plus_plus and sampler != "ddim":
            raise RequestError(f"CFG++ goes along the unlabelled eps, which {sampler} does not; use ddim")
        if sampler == "ddpm":
            if eta:
                raise RequestError("eta belongs to ddim; ddpm has its own variance")
            return ddpm_table(self.diffusion, steps, variance)
        if sampler == "ddim":
            if variance is not None:
                raise RequestError("variance belongs to ddpm; the noise of ddim is set by eta")
            return ddim_table(self._diffusion(plus_plus), steps, eta)
        if sampler in ("dpmpp", "plms"):
            if eta or variance is not None:
                raise RequestError(f"{sampler} adds no noise; leave eta and variance out")
            return (dpmpp_table if sampler == "dpmpp" else plms_table)(self.diffusion, steps)
        raise RequestError(f"unknown sampler {sampler!r}; known: ddim, ddpm, dpmpp, plms")

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
        """The n requests of sample(), checked: labels, seed, seeds, guidance, cond and cfg_scale are as there.

        table: of coefficients, of table() or one's own.
        """
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
        """Every step of every request, as they happen; a finished image's slot goes to the next request.

        On a GPU a step whose image is not finished must be read, if at all, before the next is asked for (see Step).
        requests: as many as are wanted, taken when a slot is free. guidance: the classifier of all that have a scale.
        noise: where normals come from. batch_size: the largest batch of the network.
        """
        self._check_run(guidance, batch_size)
        waiting = iter(requests)
        first = list(islice(waiting, batch_size))
        waiting = chain(first, waiting)
        with self._pool.borrow(first, guidance, noise, batch_size) as slots:
            while True:
                for slot in slots.free:
                    request = next(waiting, None)
                    if request is None:
                        break
                    slots.enter(slot, request)
                if slots.is_empty:
                    return
                yield from slots.step()

    @property
    def _shape(self) -> tuple[int, int, int]:
        return (self.config.in_channels, *self.config.image_size)

    def _diffusion(self, plus_plus: bool) -> Diffusion:
        """The checkpoint's, for CFG++ with steps along an eps of their own."""
        return dataclasses.replace(self.diffusion, keeps_eps=True) if plus_plus else self.diffusion

    def _plan(
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
    ) -> Plan:
        table = self.table(steps, sampler, eta, variance, _is_plus_plus(cfg_scale))
        requests = self.requests(n, table, labels, seed, seeds, guidance, cond, cfg_scale)
        self._check_run(guidance, batch_size)
        return Plan(requests, guidance, noise, batch_size)

    def _run(self, plan: Plan) -> Iterator[Step]:
        return self.run(plan.requests, plan.guidance, plan.noise, plan.batch_size)

    def _raw(self, plan: Plan) -> Tensor:
        """The last x of every request, [n, C, H, W]."""
        images = torch.empty(len(plan.requests), *self._shape)
        for step in self._run(plan):
            if step.is_last:
                images[step.request.index] = step.x_prev
        return images

    def _finish(self, plan: Plan) -> Tensor:
        return self._raw(plan).clamp(-1, 1)

    def _images(self, images: Tensor, is_noise: bool = False) -> Tensor:
        what = "noise" if is_noise else "images"
        got, expected = tuple(images.shape), ", ".join(map(str, self._shape))
        if images.ndim != 4 or not len(images) or got[1:] != self._shape:
            raise RequestError(f"{what} of shape {got} given; expected [n, {expected}], n 1 or more")
        if not images.is_floating_point():
            raise RequestError(f"{what} of {images.dtype} given; expected floats{'' if is_noise else ' in [-1, 1]'}")
        if not bool(images.isfinite().all()):
            raise RequestError(f"{what} given with NaN or infinite values; expected finite numbers")
        if not is_noise and float(images.abs().max()) > 1:
            raise RequestError(f"images reach {float(images.abs().max()):.4g}; expected values in [-1, 1]")
        return images.float()

    def _unlabelled(self, options: Options) -> Options:
        """Options in which no label is the null class, rather than one drawn from a seed."""
        if options.get("labels") is not None or self.config.num_classes is None:
            return options
        if self.config.null_class is None:
            raise RequestError("this network needs labels, and none of them means none; pass labels")
        return options | {"labels": self.config.null_class}

    def _check_run(self, guidance: ClassifierGuidance | None, batch_size: int) -> None:
        if batch_size < 1:
            raise RequestError(f"batch_size is {batch_size}; expected 1 or more")
        if guidance is not None:
            self._check_guide(guidance)

    def _check_guide(self, guidance: ClassifierGuidance) -> None:
        config = guidance.guide.config
        if (config.in_channels, config.image_size) != (self.config.in_channels, self.config.image_size):
            raise RequestError(
                f"the classifier reads {config.in_channels} channels of {config.image_size}, the network makes "
                f"{self.config.in_channels} of {self.config.image_size}; use the classifier trained for it"
            )


def _is_plus_plus(cfg: float | ClassifierFreeGuidance) -> bool:
    return isinstance(cfg, ClassifierFreeGuidance) and cfg.plus_plus
