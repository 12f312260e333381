"""Guidance: the same seeds plain, with classifier-free guidance, and pulled by a classifier.

python examples/guidance.py demo/digits.engine guidance.png
"""

import sys
from pathlib import Path

import numpy as np

from engine import ClassifierFreeGuidance, ClassifierGuidance, Sampler, load_checkpoint
from engine.images import grid, save_png, to_uint8
from engine.networks.classifier import AutogradGuide

CLASSIFIER = Path(__file__).parents[1] / "assets" / "classifier.pt"


def main(bundle: str, out: str, steps: str = "ddim50") -> None:
    sampler = Sampler.open(bundle)
    labels = list(range(10))
    plain = sampler.sample(10, steps=steps, labels=labels, seed=40)

    # Twice the step from "no label" to the label, where the image is still mostly noise.
    free = ClassifierFreeGuidance(scale=2.0, interval=(500, 999))
    guided = sampler.sample(10, steps=steps, labels=labels, seed=40, guidance_scale=free)

    # The network without its label (scale 0), pulled by a classifier's gradient. A bundle that was exported with
    # --classifier holds that gradient itself: guidance=sampler.classifier_guidance(4.0).
    classifier = load_checkpoint(CLASSIFIER, image_size=(32, 32), num_head_channels=32, noise_schedule="cosine")
    guide = AutogradGuide(classifier.classifier())
    pulled = sampler.sample(
        10, steps=steps, labels=labels, seed=40, guidance_scale=0.0, guidance=ClassifierGuidance(guide, scale=4.0)
    )

    rows = [to_uint8(images) for images in (plain, guided, pulled)]
    save_png(Path(out), grid(np.concatenate(rows), columns=10, enlarge=2))
    sampler.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
