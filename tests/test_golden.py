"""The engine against recorded results of the original implementations: one test a run, `<case folder>-<run id>`."""

from __future__ import annotations

from collections.abc import Callable

import golden_abarankab
import golden_diffusers
import golden_lucidrains
import golden_openai
import golden_tutorial
import golden_w86763777
import pytest
import torch
from golden_cases import Run, Runner, read_cases
from golden_folder import golden_root


def no_floor(_run: Run, _name: str) -> float:
    """For projects whose recorded tolerances hold everything."""
    return 0.0


# Project -> how its runs are repeated, and a floor under the recorded tolerance of an array.
FAMILIES: dict[str, tuple[dict[str, Runner], Callable[[Run, str], float]]] = {
    "openai": (golden_openai.RUNNERS, golden_openai.rounding_floor),
    "abarankab": (golden_abarankab.RUNNERS, no_floor),
    "w86763777": (golden_w86763777.RUNNERS, no_floor),
    "tutorial": (golden_tutorial.RUNNERS, no_floor),
    "diffusers": (golden_diffusers.RUNNERS, no_floor),
    "lucidrains": (golden_lucidrains.RUNNERS, no_floor),
}
# What no code handles yet: project, family, or (project, run kind) -> reason. Each is a skip.
OPEN: dict[str | tuple[str, str], str] = {
    "compvis": "no translator for this family yet",
    "diffusers-stable-diffusion": "latent diffusion is not read yet",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_run" not in metafunc.fixturenames:
        return
    root = golden_root(metafunc.config)
    if root is None:
        reason = "no golden data: pass --golden DIR or set UNET_RT_GOLDEN"
        metafunc.parametrize("golden_run", [pytest.param(None, id="none", marks=pytest.mark.skip(reason=reason))])
        return
    runs = [
        pytest.param(case.run(r["id"]), id=f"{case.folder.name}-{r['id']}")
        for case in read_cases(root)
        for r in case.data["runs"]
    ]
    metafunc.parametrize("golden_run", runs)


def test_golden(golden_run: Run) -> None:
    project, kind = golden_run.case.project, golden_run.kind
    reason = OPEN.get(project) or OPEN.get(golden_run.case.family) or OPEN.get((project, kind))
    if reason:
        pytest.skip(f"{golden_run.case.family}, {kind}: {reason}")
    runners, floor = FAMILIES[project]
    arrays = golden_run.arrays()
    results = runners[kind](golden_run, arrays)
    assert set(results) == golden_run.outputs()
    for name, value in results.items():
        got, expected = torch.as_tensor(value), arrays[name]
        atol = max(golden_run.tolerance(name), floor(golden_run, name))
        assert tuple(got.shape) == tuple(expected.shape), name
        worst = (got.double() - expected.double()).abs().max().item()
        assert worst <= atol, f"{name} differs by {worst:.3g}, tolerance {atol:.3g}"
