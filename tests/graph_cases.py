"""What tests of the device slots share."""

from __future__ import annotations

from engine.diffusion.guidance import ClassifierFreeGuidance

# The step program and Slots multiply and add in the same order; a normal may be rounded to its neighbour (see
# engine.diffusion.noise).
SAME = {"atol": 1e-6, "rtol": 1e-6}


CFG = {
    "plain": ClassifierFreeGuidance(3.0),
    "off": ClassifierFreeGuidance(1.0, 0.5, 0.5),
    "unlabelled": ClassifierFreeGuidance(0.0),
    "rescaled": ClassifierFreeGuidance(4.0, rescale=0.7),
    "projected": ClassifierFreeGuidance(4.0, parallel=0.2),
    "interval": ClassifierFreeGuidance(2.0, 0.3, 0.5, interval=(20, 70)),
    "plus plus": ClassifierFreeGuidance(0.6, plus_plus=True),
}
