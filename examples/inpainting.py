"""Inpainting: the upper half of each digit is kept, and the rest is made anew to fit it.

python examples/inpainting.py demo/digits.engine inpainting.png
"""

import sys
from pathlib import Path

import numpy as np
import torch

from engine import Sampler
from engine.images import grid, save_png, to_uint8


def main(bundle: str, out: str, steps: int = 50) -> None:
    sampler = Sampler.open(bundle)
    labels = list(range(10))
    images = sampler.sample(10, steps=steps, labels=labels, seed=40)

    mask = torch.zeros(images.shape[-2:])  # 0: kept, 1: made
    mask[16:] = 1

    # RePaint: every stretch of 5 steps is done 4 times, with noise put back between, so that both halves agree.
    filled = [
        sampler.inpaint(images, mask, jump_length=5, resamplings=4, steps=steps, labels=labels, seed=seed)
        for seed in (100, 200)
    ]

    gray = torch.where(mask > 0, 0.0, images)
    rows = [to_uint8(row) for row in (images, gray, *filled)]
    save_png(Path(out), grid(np.concatenate(rows), columns=10, enlarge=2))
    sampler.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
