"""Every example runs from a bundle of the shipped digits model, and does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine import NoiseSchedule, RequestError, Sampler
from engine.diffusion.prediction import Diffusion, Prediction, Spacing
from engine.images import to_uint8

ROOT = Path(__file__).resolve().parents[2]


def cells(path: Path, columns: int, rows: int) -> np.ndarray:
    """The images of a grid as [rows, columns, H, W]."""
    whole = np.asarray(Image.open(path))
    height, width = whole.shape[0] // rows, whole.shape[1] // columns
    return whole.reshape(rows, height, columns, width).swapaxes(1, 2)


def test_every_example_is_short_and_has_a_test():
    known = {"service", "guidance", "inpainting", "bulk", "own_solver"}
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == known
    for name in known:
        lines = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()
        assert 20 <= sum(bool(line.strip()) for line in lines) <= 60, name


def test_a_service_gives_the_images_that_sample_gives(example, digits_bundle, tmp_path):
    example("service").main(digits_bundle, str(tmp_path / "digits.png"), steps=1)
    made = cells(tmp_path / "digits.png", 10, 2)
    sampler = Sampler.open(digits_bundle)
    for index in (0, 7, 19):
        alone = to_uint8(sampler.sample(1, steps=1 + index, labels=index % 10, seed=index))[0, :, :, 0]
        # bf16 and the batch's order of sums may move a byte.
        assert np.abs(made[index // 10, index % 10].astype(int) - alone).max() <= 1
    sampler.close()


def test_a_service_refuses_a_bad_request_where_it_is_made(example, digits_bundle):
    service = example("service").Service(digits_bundle, capacity=2)
    with pytest.raises(RequestError, match="label 11 does not exist"):
        service.image(label=11, seed=0)
    service.close()


def test_guidance_changes_the_images_of_the_same_seeds(example, digits_bundle, tmp_path):
    example("guidance").main(digits_bundle, str(tmp_path / "guidance.png"), steps="ddim4")
    plain, guided, pulled = cells(tmp_path / "guidance.png", 10, 3).astype(int)
    assert all(np.abs(a - b).max() > 30 for other in (guided, pulled) for a, b in zip(plain, other, strict=True))


def test_inpainting_keeps_the_upper_half_and_makes_the_lower(example, digits_bundle, tmp_path):
    example("inpainting").main(digits_bundle, str(tmp_path / "inpainting.png"), steps=10)
    images, gray, first, second = cells(tmp_path / "inpainting.png", 10, 4).astype(int)
    half = images.shape[1] // 2
    assert np.all(gray[:, half:] == 127)
    for filled in (first, second):
        assert np.array_equal(filled[:, :half], images[:, :half])
        assert np.abs(filled[:, half:] - images[:, half:]).max() > 100


def test_bulk_resumes_where_it_stopped(example, digits_bundle, tmp_path, capsys):
    result = example("bulk").main(digits_bundle, str(tmp_path / "bulk"), n=30, steps=2)
    assert (result.kept, result.made) == (10, 20)
    assert "interrupted; whole shards stay: shard-00000.npz" in capsys.readouterr().out
    with np.load(tmp_path / "bulk" / "samples.npz") as joined:
        assert joined["arr_0"].shape == (30, 32, 32, 1)
        assert np.array_equal(joined["arr_1"], np.arange(30) % 10)


def test_the_own_solver_runs(example, digits_bundle, tmp_path):
    example("own_solver").main(digits_bundle, str(tmp_path / "own.png"), steps=4)
    assert cells(tmp_path / "own.png", 10, 2).max() > 200


def test_the_python_of_the_readme_runs(digits_bundle, tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "demo/digits.engine" in code
    monkeypatch.chdir(tmp_path)
    # Fewer images, so that it takes a second.
    exec(compile(code.replace("demo/digits.engine", digits_bundle).replace("10,", "2,"), "README.md", "exec"), {})
    assert len(list((tmp_path / "sevens").glob("*.png"))) == 2


# The scheduler hands numpy a tensor.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_own_solver_is_that_of_diffusers(example):
    """Step by step with the same predictions and the same noise."""
    diffusers = pytest.importorskip("diffusers")
    betas = np.linspace(1e-4, 0.02, 1000)
    diffusion = Diffusion(NoiseSchedule(betas), Prediction.X0, clip=None, spacing=Spacing.TRAILING)
    table = example("own_solver").sde_dpmpp_table(diffusion, 8)
    theirs = diffusers.DPMSolverMultistepScheduler(
        trained_betas=betas.tolist(), prediction_type="sample", algorithm_type="sde-dpmsolver++",
        timestep_spacing="trailing",
    )  # fmt: skip
    theirs.set_timesteps(8)
    assert table.timestep.tolist() == theirs.timesteps.tolist()
    # Its float32 product of alphas is off by 1e-4 at the noisy end: its own steps on our levels.
    abar = torch.from_numpy(diffusion.schedule.alphas_cumprod)[theirs.timesteps]
    theirs.sigmas = torch.cat([((1 - abar) / abar).sqrt(), torch.zeros(1, dtype=torch.float64)])
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, generator=rng, dtype=torch.float64)
    before = torch.zeros_like(x)
    for row, t in enumerate(theirs.timesteps):
        x0, z = (torch.randn(2, 3, generator=rng, dtype=torch.float64) for _ in range(2))
        wanted = theirs.step(x0, t, x, variance_noise=z).prev_sample
        p, q, r, s = (float(getattr(table, name)[row]) for name in "PQRS")
        x, before = p * x0 + q * x + r * before + s * z, x0
        # The scheduler computes in float32.
        torch.testing.assert_close(x, wanted.double(), rtol=1e-5, atol=1e-5)
        x = wanted.double()
