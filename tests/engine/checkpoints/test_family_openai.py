"""The translator infers the published OpenAI networks from the shapes of their tensors alone, on the meta device."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers import adm_classifier, adm_unet

from engine.checkpoints.facts import make_facts
from engine.checkpoints.families import openai
from engine.networks import config as c
from engine.networks.classifier import Classifier
from engine.networks.unet import UNet
from recipes.openai_format import to_openai


def on_meta(config: c.UNetConfig | c.ClassifierConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = UNet(config) if isinstance(config, c.UNetConfig) else Classifier(config)
    return to_openai(model.state_dict(), config)


def half_width_first(config: c.UNetConfig | c.ClassifierConfig) -> Any:
    """Multipliers 0.5, 1, ... of twice the width that the builder was given."""
    return dataclasses.replace(config, time=c.TimeConfig(2 * config.time.embed_channels, 2 * config.time.channels))


ADM = {"channels": 3, "updown": True, "learn_sigma": True, "head_dim": 64}
IMPROVED = {"channels": 3, "learn_sigma": True, "heads": 4}
SIX_LEVELS = (1, 1, 2, 2, 4, 4)

# name -> network from its public hyperparameters, and what the file cannot say.
UNETS: dict[str, tuple[c.UNetConfig, dict[str, Any]]] = {
    "ADM ImageNet 64": (
        adm_unet(**ADM, size=(64, 64), width=192, mult=(1, 2, 3, 4), depth=3, attention=(1, 2, 3), num_classes=1000),
        {"attention_order": "new", "noise_schedule": "cosine"},
    ),
    "ADM ImageNet 256": (
        adm_unet(**ADM, size=(256, 256), width=256, mult=SIX_LEVELS, depth=2, attention=(3, 4, 5), num_classes=1000),
        {},
    ),
    "ADM ImageNet 512": (
        half_width_first(
            adm_unet(
                **ADM, size=(512, 512), width=128, mult=(1, 2, 2, 4, 4, 8, 8), depth=2, attention=(4, 5, 6),
                num_classes=1000,
            )
        ),
        {},
    ),
    "ADM LSUN 256": (adm_unet(**ADM, size=(256, 256), width=256, mult=SIX_LEVELS, depth=2, attention=(3, 4, 5)), {}),
    "ADM upsampler 64 to 256": (
        adm_unet(
            channels=3, updown=True, learn_sigma=True, heads=4, size=(256, 256), width=192, mult=SIX_LEVELS, depth=2,
            attention=(3, 4, 5), num_classes=1000, super_resolution=True,
        ),
        {"num_heads": 4},
    ),
    "improved CIFAR-10": (
        adm_unet(**IMPROVED, size=(32, 32), width=128, mult=(1, 2, 2, 2), depth=3, attention=(1, 2)),
        {"family": "openai-improved", "num_train_timesteps": 4000, "noise_schedule": "cosine"},
    ),
    "improved ImageNet 64": (
        adm_unet(**IMPROVED, size=(64, 64), width=128, mult=(1, 2, 3, 4), depth=3, attention=(2, 3)),
        {"family": "openai-improved", "num_train_timesteps": 4000, "noise_schedule": "cosine"},
    ),
    "improved ImageNet 64, classes": (
        adm_unet(**IMPROVED, size=(64, 64), width=192, mult=(1, 2, 3, 4), depth=3, attention=(2, 3), num_classes=1000),
        {"family": "openai-improved"},
    ),
}  # fmt: skip

CLASSIFIER = {"channels": 3, "updown": True, "head_dim": 64, "num_classes": 1000}
CLASSIFIERS: dict[str, c.ClassifierConfig] = {
    "64": adm_classifier(**CLASSIFIER, size=(64, 64), width=128, mult=(1, 2, 3, 4), depth=4, attention=(1, 2, 3)),
    "128": adm_classifier(**CLASSIFIER, size=(128, 128), width=128, mult=(1, 1, 2, 3, 4), depth=2, attention=(2, 3, 4)),
    "256": adm_classifier(**CLASSIFIER, size=(256, 256), width=128, mult=SIX_LEVELS, depth=2, attention=(3, 4, 5)),
    "512": half_width_first(
        adm_classifier(
            **CLASSIFIER, size=(512, 512), width=64, mult=(1, 2, 2, 4, 4, 8, 8), depth=2, attention=(4, 5, 6)
        )
    ),
}


@pytest.mark.parametrize("name", UNETS)
def test_published_unet_is_inferred_from_shapes(name):
    config, facts = UNETS[name]
    found = openai.translate(on_meta(config), make_facts(facts))
    assert found.config == config
    unsaid = {assumption.name for assumption in found.assumptions}
    assert "image_size" in unsaid
    assert "noise_schedule" in facts or "noise_schedule" in unsaid
    assert ("num_head_channels" in unsaid) == (not {"num_heads", "family"} & set(facts))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_published_classifier_is_inferred_from_shapes(name):
    config = CLASSIFIERS[name]
    found = openai.translate(on_meta(config), make_facts({"image_size": config.image_size}))
    assert found.config == config


def test_sizes_are_those_of_the_papers():
    """Parameters in millions, Dhariwal & Nichol (2021), table 11 (296, 554, 559) and Nichol & Dhariwal (2021)."""
    published = {"ADM ImageNet 64": 296, "ADM ImageNet 256": 554, "ADM ImageNet 512": 559, "improved CIFAR-10": 52.5}
    for name, millions in published.items():
        count = sum(tensor.numel() for tensor in on_meta(UNETS[name][0]).values()) / 1e6
        assert count == pytest.approx(millions, rel=0.01), name
