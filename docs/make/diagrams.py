"""The diagrams of the page on concepts, as SVG files.

python docs/make/diagrams.py            writes docs/diagrams/*.svg
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from engine.diffusion.prediction import Diffusion, Prediction  # noqa: E402
from engine.diffusion.schedule import cosine_schedule  # noqa: E402
from engine.diffusion.solvers import ddim_table  # noqa: E402

OUT = ROOT / "docs" / "diagrams"
INK, SOFT, BLUE, GREEN, ORANGE = "#263238", "#90a4ae", "#bbdefb", "#c8e6c9", "#ffe0b2"


@contextmanager
def canvas(name: str, width: float, height: float) -> Iterator[Axes]:
    """Axes in tenths of an inch, saved as docs/diagrams/NAME.svg."""
    plt.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "svg.hashsalt": name})
    figure = plt.figure(figsize=(width / 10, height / 10))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    yield axes
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / f"{name}.svg", metadata={"Date": None})
    figure.savefig(Path("/tmp") / f"diagram-{name}.png", dpi=110)
    plt.close(figure)


def box(axes: Axes, x: float, y: float, w: float, h: float, text: str, color: str = "white", size: float = 9) -> None:
    shape = FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.5", fc=color, ec=INK, lw=0.9)
    axes.add_patch(shape)
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", color=INK, size=size)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.0, "shrinkA": 0, "shrinkB": 0})
    if text:
        axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 - 0.7, text, ha="center", va="bottom", size=8)


def cells(axes: Axes, x: float, y: float, columns: Sequence[str], rows: Sequence[Sequence[str]], w: float) -> None:
    for place, name in enumerate(columns):
        axes.text(x + (place + 0.5) * w, y + 1, name, ha="center", va="center", weight="bold", size=8.5)
    for line, row in enumerate(rows):
        for place, value in enumerate(row):
            top = y + 2.2 + line * 2.4
            fill = BLUE if place == 0 else "white"
            axes.add_patch(plt.Rectangle((x + place * w, top), w, 2.4, fc=fill, ec=SOFT, lw=0.7))
            axes.text(x + (place + 0.5) * w, top + 1.2, value, ha="center", va="center", size=8.5)


def table() -> None:
    """Five rows of DDIM on a cosine schedule of 1000 timesteps, for a network that predicts x0."""
    made = ddim_table(Diffusion(cosine_schedule(1000), Prediction.X0), 5, eta=0.5)
    shown = ("timestep", "A", "B", "P", "Q", "S")
    rows = [[f"{made.timestep[i]:.0f}", *(f"{getattr(made, n)[i]:.3g}" for n in shown[1:])] for i in range(5)]
    with canvas("table", 86, 21) as axes:
        cells(axes, 1, 0.5, shown, rows, 7)
        for line in range(5):
            arrow(axes, (44, 3.9 + line * 2.4), (50, 3.9 + line * 2.4))
            axes.text(51, 3.9 + line * 2.4, f"step {line + 1}", va="center", size=8.5)
        box(axes, 58, 2.7, 27, 12, "x0 = limit(A x_t + B out)\n\nx_prev = P x0 + Q x_t + S z", GREEN)
        axes.text(1, 18, "ddim_table(diffusion, steps=5, eta=0.5): each row holds the numbers of one step. "
                  "The update never changes.", size=8.5, va="center")  # fmt: skip


def slots() -> None:
    """Four slots over the steps of a batch: requests of different lengths enter and leave."""
    lanes = (
        ((0, 10, "A: ddim, 10 steps", BLUE), (10, 4, "E: 4 steps", GREEN)),
        ((0, 6, "B: dpmpp, 6 steps", GREEN), (6, 8, "F: ddpm, 8 steps", ORANGE)),
        ((0, 8, "C: ddim, 8 steps", ORANGE), (8, 6, "G: ddim, 6 steps", BLUE)),
        ((0, 4, "D: 4 steps", BLUE), (4, 8, "H: plms, 7 steps", ORANGE), (12, 2, "free", "white")),
    )
    with canvas("slots", 86, 24) as axes:
        for line, lane in enumerate(lanes):
            axes.text(1, 3.6 + line * 4, f"slot {line}", va="center", size=8.5)
            for first, length, text, color in lane:
                box(axes, 8 + first * 5.4, 2 + line * 4, length * 5.4 - 0.4, 3.2, text, color, 8)
        axes.add_patch(plt.Rectangle((8 + 6 * 5.4, 0.8), 5.0, 17.6, fill=False, ec=INK, lw=1.4, ls="--"))
        axes.text(
            8 + 6.5 * 5.4, 19.6, "one network call: A at its step 7, F at 1, C at 7, H at 3", ha="center", size=8.5
        )
        arrow(axes, (8, 21.6), (83, 21.6))
        axes.text(83, 22.9, "network calls", ha="right", size=8)


def seed() -> None:
    """From a seed to the noise of each step."""
    with canvas("seed", 86, 22) as axes:
        box(axes, 1, 8, 14, 5, "seed = 17", BLUE)
        box(axes, 24, 7, 22, 7, "Philox 4x32-10\nkey: the seed\ncounter: element, draw, stream", GREEN, 8.5)
        arrow(axes, (15, 10.5), (24, 10.5), "key")
        targets = ("draw 0: x_T, where the image starts", "draw 1: z of its first step", "draw k: z of its k-th step",
                   "stream 2: its label, where none is given")  # fmt: skip
        for line, text in enumerate(targets):
            top = 1 + line * 4.6
            box(axes, 55, top, 30, 3.6, text, "white", 8.5)
            arrow(axes, (46, 10.5), (55, top + 1.8))
        axes.text(1, 20.6, "Nothing else goes in: neither the batch, nor the slot, nor the images beside it.", size=8.5,
                  va="center")  # fmt: skip


def bundle() -> None:
    """What a checkpoint becomes, and who reads it."""
    files = (
        ("manifest.json", "what the networks are, assumptions, hashes, errors"),
        ("unet.safetensors", "native, eager"),
        ("unet.onnx", "ov, ort"),
        ("unet.fp16.onnx", "ort, and the source of plans"),
        ("unet.rtx.plan", "trt"),
        ("unet.int8.json", "native in int8"),
        ("classifier.*", "guidance on any of them"),
    )
    with canvas("bundle", 86, 28) as axes:
        box(axes, 1, 10, 12, 6, "ckpt.pt\n(any family)", BLUE)
        arrow(axes, (13, 13), (27, 13), "export, verify")
        axes.add_patch(FancyBboxPatch((27, 1), 58, 24, boxstyle="round,pad=0,rounding_size=0.8", fc="#fafafa", ec=INK))
        axes.text(28.5, 3, "ckpt.engine/", weight="bold", va="center")
        for line, (name, who) in enumerate(files):
            top = 4.6 + line * 2.8
            box(axes, 28.5, top, 16, 2.2, name, ORANGE if line == 0 else GREEN, 8.5)
            axes.text(46, top + 1.1, who, va="center", size=8.5)
        axes.text(
            1,
            26.8,
            "A folder of data. Opening it runs no code from it and never writes into it.",
            size=8.5,
            va="center",
        )


def conditions() -> None:
    """What a network is given, and the doubled half of classifier-free guidance."""
    with canvas("conditions", 86, 26) as axes:
        axes.text(1, 2, "With classifier-free guidance an image stands in the batch twice:", size=8.5, va="center")
        for line, (label, note, color) in enumerate(
            (("7", "with", GREEN), ("none (the null class)", "without", ORANGE))
        ):
            top = 4 + line * 10
            box(axes, 1, top, 12, 3, "x_t", BLUE)
            box(axes, 1, top + 3.4, 12, 3, "timestep", BLUE)
            box(axes, 15, top, 22, 3, f"label: {label}", color, 8.5)
            box(axes, 15, top + 3.4, 22, 3, "image: the same in both", "white", 8.5)
            arrow(axes, (38, top + 3.2), (46, 13 - 1.5 + 3 * line))
            axes.text(41, top - 0.2 if line == 0 else top + 6.4, note, size=8, ha="center", style="italic")
        box(axes, 46, 9.2, 13, 7, "network\n(one call)", "white")
        arrow(axes, (59, 13), (65, 13))
        box(axes, 65, 9, 20, 8, "out = without\n+ scale * (with - without)", GREEN, 8.5)
        axes.text(54, 24, "An unguided image stands in the batch once.", size=8.5, va="center")


if __name__ == "__main__":
    np.seterr(divide="ignore")
    for make in (table, slots, seed, bundle, conditions):
        make()
