"""engine.sampling.options: one value for every verb, checked where it is made."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from elementwise import LABELLED, PLAIN, Elementwise

from engine import ClassifierFreeGuidance, RequestError, Sampler, SamplingOptions, Variance
from engine.diffusion.solvers import SAMPLERS


def test_options_and_changes_are_one_value():
    """A value, single fields by name, or both, of which the fields go first."""
    sampler = Sampler(Elementwise(LABELLED))
    options = SamplingOptions(steps=4, sampler="ddpm", labels=2, seed=7)
    expected = sampler.sample(2, steps=4, sampler="ddpm", labels=2, seed=7)
    assert torch.equal(sampler.sample(2, options), expected)
    assert torch.equal(sampler.sample(2, options, seed=9), sampler.sample(2, dataclasses.replace(options, seed=9)))
    assert options.seed == 7


@pytest.mark.parametrize("variance", Variance)
def test_strings_and_enums(variance):
    """A name is its member, in every verb that takes a variance."""
    sampler = Sampler(Elementwise(LABELLED))
    by_member = sampler.sample(2, steps=4, sampler="ddpm", variance=variance)
    assert torch.equal(sampler.sample(2, steps=4, sampler="ddpm", variance=variance.value), by_member)
    assert SamplingOptions(sampler="ddpm", variance=variance.value).variance is variance


def test_a_number_is_classifier_free_guidance_of_that_scale():
    assert SamplingOptions(guidance_scale=3).free_guidance == ClassifierFreeGuidance(3.0)
    rescaled = ClassifierFreeGuidance(2.0, rescale=0.5)
    assert SamplingOptions(guidance_scale=rescaled).free_guidance is rescaled


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_sampler_refuses_the_options_of_others(name):
    """Every option that a sampler does not take is an error, and those it takes change its table."""
    sampler = Sampler(Elementwise(PLAIN))
    plain = sampler.table(steps=5, sampler=name).to_array()
    values: dict[str, dict[str, Any]] = {
        "eta": {"eta": 0.5},
        "variance": {"variance": "fixed_small"},
        "plus_plus": {"guidance_scale": ClassifierFreeGuidance(0.6, plus_plus=True)},
    }
    for option, given in values.items():
        if option in SAMPLERS[name].options:
            assert not (sampler.table(steps=5, sampler=name, **given).to_array() == plain).all()
        else:
            with pytest.raises(RequestError, match=name):
                sampler.table(steps=5, sampler=name, **given)


KNOWN = "known: steps, sampler, eta, variance, labels, seed, seeds, guidance, guidance_scale, image, noise, batch_size"
REFUSALS = {
    f"unknown option 'cfg_scale'; {KNOWN}": lambda s: s.sample(1, cfg_scale=2.0),
    f"unknown option 'step'; {KNOWN}": lambda s: s.stream(1, step=2),
    "options is 50; expected a SamplingOptions, or single options by name": lambda s: s.sample(1, 50),
    "unknown variance 'small'; known: fixed_small, fixed_large, learned_range": lambda s: s.sample(
        1, sampler="ddpm", variance="small"
    ),
    "eta is '0.5'; expected a number": lambda s: s.sample(1, eta="0.5"),
    "seed is 1.5; expected a whole number": lambda s: s.sample(1, seed=1.5),
    "guidance is 2.0; expected a ClassifierGuidance or None": lambda s: s.sample(1, guidance=2.0),
    "guidance_scale is '3'; expected a number or a ClassifierFreeGuidance": lambda s: s.sample(1, guidance_scale="3"),
    "batch_size is 2.5; expected 1 or more": lambda s: s.sample(1, batch_size=2.5),
    "a table says which steps are taken; leave steps, eta or table out": lambda s: s.requests(
        1, table=s.table(), steps=4, eta=0.5
    ),
    "the bound belongs to the network alone; leave sampler, eta": lambda s: s.nll(torch.zeros(1, 1, 4, 4), eta=0.5),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    with pytest.raises(RequestError, match=message):
        REFUSALS[message](Sampler(Elementwise(PLAIN)))
