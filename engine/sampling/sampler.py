"""Images from a bundle: requests are put into slots, and a slot that empties goes to the next request."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from engine.backends.protocol import Backend
from engine.backends.registry import open_backend, open_guide
from engine.bundle.bundle_folder import Bundle
from engine.diffusion.guidance import ClassifierGuidance, Guide
from engine.diffusion.ladder import Steps
from engine.diffusion.noise import NOISE, NoiseSource, normal
from engine.diffusion.repaint import with_jumps
from engine.diffusion.solvers import StepTable, ddim_inversion_table, ddim_table, for_plus_plus, starting_level
from engine.errors import RequestError
from engine.networks.inputs import join_conditions
from engine.sampling.likelihood import variational_bound
from engine.sampling.options import SamplingOptions, changed_options, refuse
from engine.sampling.pool import SlotPool
from engine.sampling.requests import Request, check_classifier, images_at_a_time, make_requests, unlabelled
from engine.sampling.results import Preview, Progress, previews
from engine.sampling.slot_batch import SlotBatch, Step
from engine.sampling.starts import great_circle, noised


class Sampler:
    """Images from a bundle: opens a backend once and runs requests through its slots.

    backend: what runs the network; Sampler.open opens one. bundle: where it came from, for its classifier. threads: CPU
    threads of that classifier, None for all cores. In a `with` block a sampler is closed at its end.

    Every verb takes options, a SamplingOptions (None for the defaults), and changes, single fields of it by name that
    go before those of options: sample(4, options, seed=7).
    """

    def __init__(self, backend: Backend, bundle: Bundle | None = None, threads: int | None = None) -> None:
        self.backend, self._bundle, self._threads = backend, bundle, threads
        self._pool = SlotPool(backend)
        self.config = backend.manifest.unet.config
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

    def __enter__(self) -> Sampler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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
        """Release the backend; the sampler cannot be used afterwards."""
        self._pool.close()
        self.backend.close()

    def sample(self, n: int, options: SamplingOptions | None = None, **changes: Any) -> Tensor:
        """n images, float32 [n, C, H, W] in [-1, 1].

        Raises RequestError for an unknown option, and for one that does not fit the network.
        """
        return self._finish(self._made(n, changed_options(options, changes)))

    def stream(self, n: int, options: SamplingOptions | None = None, **changes: Any) -> Iterator[Preview]:
        """What sample(n) makes, step by step: after each step of each image its x0 so far, and at the end the image.

        Images come as their slots do: up to batch_size in turn. Bad options raise RequestError at the call.
        """
        return previews(self._steps(self._made(n, changed_options(options, changes))))

    def progressive(self, n: int, options: SamplingOptions | None = None, **changes: Any) -> Progress:
        """Every step of n images: x after the step and the x0 it went by, each [n, steps, C, H, W] float32.

        Options and errors are those of sample().
        """
        made = self._made(n, changed_options(options, changes))
        shape = (n, len(made.requests[0].table), *self._shape)
        progress, taken = Progress(torch.empty(shape), torch.empty(shape)), [0] * n
        for step in self._steps(made):
            image = step.request.index
            progress.x[image, taken[image]], progress.x0[image, taken[image]] = step.x_prev, step.x0
            taken[image] += 1
        return progress

    def interpolate(
        self, first_seed: int, second_seed: int, n: int, options: SamplingOptions | None = None, **changes: Any
    ) -> Tensor:
        """n images from that of first_seed to that of second_seed, both included, float32 [n, C, H, W] in [-1, 1].

        n is 2 or more. The start noises lie on a great circle, at equal angles: Song et al., DDIM (2021), appendix D.5.
        labels, where None, are drawn from the first seed. Raises RequestError for a sampler that adds noise.
        """
        if n < 2:
            raise RequestError(f"n is {n}; expected 2 or more images to interpolate")
        given = changed_options(options, changes)
        refuse(given, ("seed", "seeds"), "interpolate has its two seeds; leave seed and seeds out")
        made = self._made(n, dataclasses.replace(given, seeds=[first_seed] * n))
        if made.requests[0].table.S.any():
            raise RequestError("images between two seeds need a sampler without noise: ddim with eta 0, dpmpp or plms")
        ends = torch.from_numpy(given.noise([first_seed, second_seed], [0, 0], self._shape, NOISE))
        weights = torch.linspace(0, 1, n, dtype=torch.float64).tolist()
        return self._finish(made.starting_at([great_circle(ends[0], ends[1], w) for w in weights]))

    def encode(self, images: Tensor, options: SamplingOptions | None = None, **changes: Any) -> Tensor:
        """The noise [n, C, H, W] float32 that decode() turns into these images, by DDIM inversion with eta 0.

        images: [n, C, H, W] in [-1, 1]. labels: as decode() is to use them; None is the null class, and an error
        where the network has labels but no null class. Song et al., DDIM (2021), section 4.3. Raises RequestError.
        """
        starts = self._images(images)
        given = self._deterministic(changed_options(options, changes), "encode")
        diffusion = for_plus_plus(self.diffusion) if given.free_guidance.plus_plus else self.diffusion
        made = self._made(len(starts), given)
        return self._raw(made.along(ddim_inversion_table(diffusion, given.steps)).starting_at(starts))

    def decode(self, x_T: Tensor, options: SamplingOptions | None = None, **changes: Any) -> Tensor:
        """Images [n, C, H, W] in [-1, 1] of start noise x_T [n, C, H, W], by DDIM with eta 0; see encode()."""
        starts = self._images(x_T, is_noise=True)
        given = self._deterministic(changed_options(options, changes), "decode")
        return self._finish(self._made(len(starts), given).starting_at(starts))

    def img2img(
        self, images: Tensor, strength: float = 0.5, options: SamplingOptions | None = None, **changes: Any
    ) -> Tensor:
        """Variations of images [n, C, H, W] in [-1, 1]: noised part of the way, then denoised; Meng et al., SDEdit.

        strength: share of the steps that is run, in (0, 1], at least one. The noise is draw 0 of each seed. Returns
        float32 [n, C, H, W] in [-1, 1]. Raises RequestError.
        """
        known = self._images(images)
        if not 0 < strength <= 1:
            raise RequestError(f"strength is {strength}; expected a number above 0, at most 1")
        given = changed_options(options, changes)
        made = self._made(len(known), given)
        whole = made.requests[0].table
        table = whole.last(max(1, round(strength * len(whole))))
        seeds = [request.seed for request in made.requests]
        z = torch.from_numpy(given.noise(seeds, [0] * len(seeds), self._shape, NOISE))
        starts = noised(known, starting_level(self.diffusion, table), z)
        return self._finish(made.along(table).starting_at(starts))

    def inpaint(
        self,
        images: Tensor,
        mask: Tensor,
        options: SamplingOptions | None = None,
        *,
        jump_length: int = 1,
        resamplings: int = 1,
        **changes: Any,
    ) -> Tensor:
        """images [n, C, H, W] in [-1, 1] with the part where mask is 1 made anew, to fit the rest.

        mask: [H, W], [C, H, W], or [n, 1 or C, H, W] of numbers from 0 (kept) to 1 (made). Lugmayr et al., RePaint
        (2022), eq. 8: after every step the kept part is the image, noised to that step's level. resamplings: how often
        each stretch of jump_length steps is done, with noise put back between (algorithm 1; 10 of length 10 in the
        paper); 1 does it once. Returns float32 [n, C, H, W] in [-1, 1]. Raises RequestError, also for resamplings with
        a learned variance or with dpmpp or plms.
        """
        known = self._images(images)
        try:
            whole = mask.float().expand(known.shape)
        except RuntimeError as error:
            raise RequestError(f"mask has shape {tuple(mask.shape)}; expected one for {tuple(known.shape)}") from error
        if not bool(((whole >= 0) & (whole <= 1)).all()):
            raise RequestError("mask holds values outside 0 (kept) to 1 (made)")
        made = self._made(len(known), changed_options(options, changes))
        table = with_jumps(self.diffusion, made.requests[0].table, jump_length, resamplings)
        requests = [
            dataclasses.replace(r, table=table, known=known[r.index], mask=whole[r.index]) for r in made.requests
        ]
        return self._finish(dataclasses.replace(made, requests=requests))

    def nll(
        self, images: Tensor, options: SamplingOptions | None = None, *, steps: Steps | None = None, **changes: Any
    ) -> Tensor:
        """The variational bound of images [n, C, H, W] in [-1, 1] in bits per dimension, [n]; lower is likelier.

        steps: all of training's unless given here, whatever the options say about a sampler. labels: None is the null
        class. Of the options labels, seed, seeds, image, noise and batch_size apply. Improved DDPM (2021), eq. 4 to 7,
        as OpenAI's code evaluates it. Raises RequestError.
        """
        x0 = self._images(images)
        if self.config.self_condition:
            raise RequestError("the bound takes each step by itself; this network is given the x0 of the step before")
        given = unlabelled(self.config, changed_options(options, changes))
        unused = ("sampler", "eta", "variance", "guidance", "guidance_scale")
        refuse(given, unused, f"the bound belongs to the network alone; leave {', '.join(unused)} out")
        made = make_requests(self.config, len(x0), ddim_table(self.diffusion, 1), given)
        totals = []
        for first in range(0, len(made), given.batch_size):
            part = made[first : first + given.batch_size]
            terms = variational_bound(
                self.backend,
                x0[first : first + given.batch_size],
                len(self.diffusion.schedule) if steps is None else steps,
                conditions=join_conditions([request.conditions for request in part]),
                seeds=[r.seed for r in part],
                noise=given.noise,
            )
            totals.append(terms.total)
        return torch.cat(totals)

    def table(self, options: SamplingOptions | None = None, **changes: Any) -> StepTable:
        """The table of the options' sampler on this checkpoint's schedule.

        steps, sampler, eta, variance and the plus_plus of guidance_scale apply. Raises RequestError.
        """
        return changed_options(options, changes).table(self.diffusion)

    def requests(
        self, n: int, options: SamplingOptions | None = None, *, table: StepTable | None = None, **changes: Any
    ) -> list[Request]:
        """The n requests of sample(n), checked against the network, for run() or for slots().

        table: of coefficients, one's own instead of that of the options. Raises RequestError.
        """
        given = changed_options(options, changes)
        if table is not None:
            ignored = [name for name in ("steps", "sampler", "eta", "variance") if name in changes]
            if ignored:
                raise RequestError(f"a table says which steps are taken; leave {', '.join(ignored)} or table out")
        return make_requests(self.config, n, given.table(self.diffusion) if table is None else table, given)

    def run(
        self,
        requests: Iterable[Request],
        guide: Guide | None = None,
        noise: NoiseSource = normal,
        batch_size: int = 16,
    ) -> Iterator[Step]:
        """Every step of every request, as they happen; a finished image's slot goes to the next request.

        requests: as many as are wanted. guide: the classifier of requests with guidance, options.guide. noise and
        batch_size: as in SamplingOptions. There are as many slots as one call of the network can step, as the first
        batch_size requests need it; later ones are taken when a slot is free for them, no earlier. On a GPU a step
        whose image is not finished must be read, if at all, before the next is asked for (see Step). Raises
        RequestError for a request or a guide that does not fit the network.
        """
        if batch_size < 1:
            raise RequestError(f"batch_size is {batch_size}; expected 1 or more")
        self._check_guide(guide)
        waiting = iter(requests)
        first = list(islice(waiting, batch_size))
        waiting = chain(first, waiting)
        capacity = max(1, min(len(first), images_at_a_time(first, batch_size)))
        with self._pool.borrow(capacity, guide, noise, batch_size) as slots:
            while True:
                for slot in slots.free:
                    request = next(waiting, None)
                    if request is None:
                        break
                    slots.enter(slot, request)
                if slots.is_empty:
                    return
                yield from slots.step()

    def slots(
        self,
        capacity: int,
        guide: Guide | None = None,
        noise: NoiseSource = normal,
        batch_size: int | None = None,
    ) -> AbstractContextManager[SlotBatch]:
        """Empty slots for images of many callers, who enter, step and leave them as they like; see SlotBatch.

        To be used in a `with` block, at whose end the images in progress are dropped. capacity: images in progress.
        guide: the classifier of requests with guidance, None where there are none such. noise: as in SamplingOptions.
        batch_size: the network's largest batch, `capacity` or more; None for twice the capacity, so that
        classifier-free guidance takes one call a step. Requests are made by requests(). Raises RequestError.
        """
        if capacity < 1:
            raise RequestError(f"capacity is {capacity}; expected 1 or more slots")
        if batch_size is not None and batch_size < capacity:
            raise RequestError(f"batch_size is {batch_size}; expected {capacity} or more, for one call steps all slots")
        self._check_guide(guide)
        return self._pool.borrow(capacity, guide, noise, 2 * capacity if batch_size is None else batch_size)

    @property
    def _shape(self) -> tuple[int, int, int]:
        return (self.config.in_channels, *self.config.image_size)

    def _check_guide(self, guide: Guide | None) -> None:
        if guide is not None:
            check_classifier(self.config, guide.config)

    def _made(self, n: int, options: SamplingOptions) -> _Run:
        """The requests of a verb, with the options that they are run with."""
        return _Run(make_requests(self.config, n, options.table(self.diffusion), options), options)

    def _steps(self, made: _Run) -> Iterator[Step]:
        options = made.options
        return self.run(made.requests, options.guide, options.noise, options.batch_size)

    def _raw(self, made: _Run) -> Tensor:
        """The last x of every request, [n, C, H, W]."""
        images = torch.empty(len(made.requests), *self._shape)
        for step in self._steps(made):
            if step.is_last:
                images[step.request.index] = step.x_prev
        return images

    def _finish(self, made: _Run) -> Tensor:
        return self._raw(made).clamp(-1, 1)

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

    def _deterministic(self, options: SamplingOptions, verb: str) -> SamplingOptions:
        """The options of DDIM with eta 0, where no label is the null class."""
        refuse(options, ("sampler", "eta"), f"{verb} is DDIM with eta 0; leave sampler and eta out")
        return unlabelled(self.config, options)


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """Requests, and the options that they are run with."""

    requests: list[Request]
    options: SamplingOptions

    def along(self, table: StepTable) -> _Run:
        """The same by another table."""
        return dataclasses.replace(self, requests=[dataclasses.replace(r, table=table) for r in self.requests])

    def starting_at(self, starts: Iterable[Tensor]) -> _Run:
        """The same with these [C, H, W] instead of the first noise."""
        requests = [dataclasses.replace(r, x_start=x) for r, x in zip(self.requests, starts, strict=True)]
        return dataclasses.replace(self, requests=requests)
