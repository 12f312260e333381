"""Peers: loops and pipelines that do the same work as ours, and reports that notice others."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    FP32_OTHER_ORDER,
    adm_classifier,
    adm_unet,
    random_network,
    tiny_manifest,
    with_classifier,
    write_bundle,
)
from report_cases import check_schema
from torch import Tensor

from benchmarks import random_models
from benchmarks.core.report import EXIT_RED, read_report
from benchmarks.core.timing import Series
from benchmarks.peers import ddim_loop, libraries, lucidrains_package
from benchmarks.peers.contender import Contender, Entrant
from benchmarks.peers.ddim_loop import SCALE, Task, classifier_gradient, timesteps
from benchmarks.peers.entrants import OURS, Subject, check_checkpoint, entrants_of, loop, ours, read_classifier
from benchmarks.peers.libraries import LibraryNetwork
from benchmarks.peers.peer_benchmark import Measured, main, make_comparisons, same_images
from engine.backends.eager.eager_backend import EagerBackend
from engine.bundle.bundle_folder import Bundle
from engine.bundle.from_checkpoint import checkpoint_manifest
from engine.bundle.manifest import ClassifierEntry, Manifest, NetworkEntry, Networks
from engine.checkpoints.load import load_checkpoint
from engine.diffusion.guidance import ClassifierGuidance
from engine.diffusion.prediction import Diffusion, Prediction, Spacing, Variance
from engine.diffusion.schedule import cosine_schedule
from engine.errors import BackendError, RequestError
from engine.files import file_sha256
from engine.networks.classifier import AutogradGuide
from engine.sampling.sampler import Sampler
from export.to_onnx import save_weights
from judging.digits import CHECKPOINT, CLASSIFIER, FACTS
from recipes.diffusers_format import write_folder

CPU = torch.device("cpu")

# Five steps of a tiny network with random weights, each step's rounding carried on by those that follow.
CHAIN_ROUNDING = 20 * FP32_OTHER_ORDER


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """For networks as tiny as these a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The loop -------------------------------------------------------------------------------------------------------------


def diffusion_of(prediction: Prediction, **conventions: Any) -> Diffusion:
    return Diffusion(cosine_schedule(64), prediction, **conventions)


KINDS = {
    "eps": diffusion_of(Prediction.EPS),
    "eps kept": diffusion_of(Prediction.EPS, keeps_eps=True),
    "x0, learned variance": diffusion_of(Prediction.X0, variance=Variance.LEARNED_RANGE),
    "v": diffusion_of(Prediction.V, ends_at_first=True),
    "strided as diffusers": diffusion_of(Prediction.EPS, keeps_eps=True, spacing=Spacing.LEADING, strides=True),
}


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_makes_our_images(kind, guided):
    diffusion = KINDS[kind]
    config = adm_unet(learn_sigma=diffusion.variance is Variance.LEARNED_RANGE, num_classes=4, null_class=3)
    unet, classifier = random_network(config), random_network(adm_classifier(num_classes=3))
    sampler = Sampler(
        EagerBackend(
            Manifest("openai-guided", Networks(NetworkEntry(config)), diffusion, "00" * 32), unet, "fp32", None
        )
    )
    task = Task(5, guided, (0, 2), seed=5)
    gradient = classifier_gradient(classifier, task, CPU) if guided else None
    got = ddim_loop.sample(unet, config, diffusion, task, CPU, gradient)
    wanted = sampler.decode(
        task.start(config, CPU),
        steps=timesteps(diffusion, 5).tolist(),
        labels=[0, 2],
        guidance=ClassifierGuidance(AutogradGuide(classifier), SCALE) if guided else None,
    )
    torch.testing.assert_close(got, wanted, rtol=0, atol=CHAIN_ROUNDING)
    assert float((wanted[0] - wanted[1]).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("spacing", "wanted"),
    [
        (Spacing.EVEN, [0, 4, 8, 12]),
        (Spacing.LEADING, [0, 4, 8, 12]),
        (Spacing.TRAILING, [3, 7, 12, 16]),
        (Spacing.LINSPACE, [0, 5, 11, 16]),
        (Spacing.TRUNCATED, [3, 7, 11, 16]),
    ],
)
def test_timesteps_are_those_of_the_checkpoints_project(spacing, wanted):
    diffusion = Diffusion(cosine_schedule(17), spacing=spacing)
    assert timesteps(diffusion, 4).tolist() == wanted
    with pytest.raises(RequestError, match="18 steps asked for and the schedule has 17"):
        timesteps(diffusion, 18)


def test_what_is_not_compared():
    usual = KINDS["eps"]
    assert ddim_loop.reason_against(adm_unet(num_classes=3), usual) is None
    percentile = dataclasses.replace(usual, percentile=0.9)
    assert "x0 or v" in (ddim_loop.reason_against(adm_unet(), percentile) or "")
    assert "conditions" in (ddim_loop.reason_against(adm_unet(super_resolution=True), usual) or "")


# Other projects -------------------------------------------------------------------------------------------------------


def bundle_of(path: Path, folder: Path, **facts: Any) -> Path:
    """A bundle of a checkpoint that the eager backend can run; nothing was exported."""
    checkpoint = load_checkpoint(path, **facts)
    folder.mkdir()
    save_weights(checkpoint.weights, folder / "unet.safetensors")
    Bundle.write(folder, checkpoint_manifest(checkpoint))
    return folder


def entrants_named(*names: str) -> Callable[[Subject], list[Entrant]]:
    """Ours in fp32: the samples of random networks are far from stable, so that bf16 gives others."""

    def choose(subject: Subject) -> list[Entrant]:
        first = Entrant(OURS, lambda: ours(subject, precision="fp32"))
        return [first, *(each for each in entrants_of(subject) if each.name in names)]

    return choose


def run_peers(bundle: Path, out: Path, make: Callable[[Subject], list[Entrant]], *options: str) -> int:
    return main([str(bundle), "--steps", "3", "--batch", "2", "--rounds", "8", "--out", str(out), *options], make)


def test_a_folder_of_diffusers_beside_its_bundle(tmp_path):
    """The shipped digits, labels and learned variance among them, and a network that it is not."""
    pytest.importorskip("diffusers")
    bundle = bundle_of(CHECKPOINT, tmp_path / "digits.engine", **FACTS)
    folder = write_folder(tmp_path / "digits")
    chosen = entrants_named("diffusers")
    assert run_peers(bundle, tmp_path, chosen, "--diffusers", str(folder)) == 0
    report = read_report(tmp_path / "peers.json")
    assert [row.case["contender"] for row in report.rows] == [report.comparisons[0].baseline, "diffusers"]
    assert (report.rows[1].metrics["psnr_db"] or 0) > 60
    settings = folder / "scheduler" / "scheduler_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"beta_schedule": "linear"}))
    assert run_peers(bundle, tmp_path, chosen, "--diffusers", str(folder)) == EXIT_RED
    assert run_peers(bundle, tmp_path, chosen, "--diffusers", str(tmp_path / "none")) == 0
    reasons = [each.reason for each in read_report(tmp_path / "peers.json").missing]
    assert any("holds no unet/ and scheduler/" in reason for reason in reasons)


def test_denoising_diffusion_pytorch_beside_its_bundle(tmp_path, monkeypatch):
    for name in ("ema_pytorch", "einops", "accelerate", "scipy"):
        pytest.importorskip(name)
    monkeypatch.setattr(lucidrains_package, "_RANDOM_NETWORK", {"dim": 8, "dim_mults": (1, 2), "channels": 1})
    monkeypatch.setattr(lucidrains_package, "_RANDOM_SIZE", 8)
    path = tmp_path / "random.pt"
    assert random_models.main([random_models.LUCIDRAINS, str(path)]) == 0
    assert random_models.main([random_models.LUCIDRAINS, str(path)]) == 2
    bundle = bundle_of(path, tmp_path / "random.engine", image_size=(8, 8), num_groups=8)
    chosen = entrants_named("denoising-diffusion-pytorch", "diffusers")
    assert run_peers(bundle, tmp_path, chosen, "--checkpoint", str(path)) == 0
    report = read_report(tmp_path / "peers.json")
    assert (report.rows[1].metrics["psnr_db"] or 0) > 60
    assert "--diffusers" in {each.variant: each.reason for each in report.missing}["diffusers"]
    assert run_peers(bundle, tmp_path, chosen) == 0
    assert any("--checkpoint" in each.reason for each in read_report(tmp_path / "peers.json").missing)


# Networks in other libraries ------------------------------------------------------------------------------------------


def test_a_plain_export_in_two_libraries(tmp_path):
    for name in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(name)
    config = adm_unet(num_classes=4)
    unet = random_network(config)
    path = libraries.plain_export(unet, 2, tmp_path / "plain.onnx")
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 50.0]), torch.tensor([1, 2])
    wanted = unet(x, t, y)
    made = [
        libraries.onnxruntime_network(path, config, CPU, 1),
        libraries.openvino_network(path, config, CPU, 1),
    ]
    assert [each.precision for each in made] == ["fp32", "bf16" if libraries.has_bf16() else "fp32"]
    for network in made:
        limit = 0.2 if network.precision == "bf16" else FP32_OTHER_ORDER * float(wanted.abs().max())
        for call in (network.call, network.beside_torch or network.call):
            torch.testing.assert_close(call(x, t, y), wanted, rtol=0, atol=limit)


def test_what_cannot_be_here_says_why(tmp_path, monkeypatch):
    config = adm_unet()
    with pytest.raises(BackendError, match="NVIDIA GPU"):
        libraries.openvino_network(tmp_path / "x.onnx", config, torch.device("cuda"), None)
    monkeypatch.setattr(libraries, "has_bf16", lambda: False)
    with pytest.raises(BackendError, match="no bf16 of its own"):
        libraries.openvino_network(tmp_path / "x.onnx", config, CPU, None, bf16=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="TensorRT needs an NVIDIA GPU"):
        libraries.tensorrt_network(random_network(config), tiny_manifest(config), 2, tmp_path)


@pytest.mark.parametrize("isa", [["avx2"], ["avx2", "amx_bf16"]])
def test_torch_compile_takes_bf16_where_the_cpu_has_it(monkeypatch, isa):
    seen = []

    def call(x: Tensor) -> Tensor:
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return x.to(torch.bfloat16) if seen[-1][0] else x

    monkeypatch.setattr(libraries, "cpu", lambda: {"isa": isa})
    monkeypatch.setattr(torch, "compile", lambda function, options: function)
    precision = libraries.torch_precision(CPU, compiled=True)
    out = libraries.compile_call(call, CPU, precision)(torch.ones(2))
    assert precision == ("bf16" if "amx_bf16" in isa else "fp32")
    assert seen == [("amx_bf16" in isa, False)]
    assert out.dtype == torch.float32
    assert libraries.torch_precision(CPU, compiled=False) == "fp32"
    assert libraries.torch_precision(torch.device("cuda"), compiled=False) == "fp16"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_network_makes_the_same_images(tmp_path, monkeypatch):
    """torch's compiler warns of its own deprecations."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    bundle = write_bundle(tmp_path / "net.engine", adm_unet(num_classes=4))
    assert run_peers(bundle, tmp_path, entrants_named("torch.compile")) == 0
    assert "torch.compile" in {row.case["contender"] for row in read_report(tmp_path / "peers.json").rows}


# Reports --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("peers") / "net.engine", adm_unet(num_classes=4, null_class=3))


def eager_loop(subject: Subject) -> Contender:
    return loop("PyTorch eager", lambda: LibraryNetwork(lambda x, t, y: subject.unet(x, t, y), "fp32"), subject)


def fails() -> Contender:
    raise BackendError("it is not installed")


def few(subject: Subject) -> list[Entrant]:
    return [
        Entrant(OURS, lambda: ours(subject, "eager")),
        Entrant("PyTorch eager", lambda: eager_loop(subject)),
        Entrant("absent", fails),
    ]


def test_a_report_from_end_to_end(tmp_path, bundle, capsys):
    assert run_peers(bundle, tmp_path, few, "--threads", "1") == 0
    data = json.loads((tmp_path / "peers.json").read_text())
    check_schema(data)
    name = f"{OURS} (eager fp32)"
    assert [row["case"] for row in data["rows"]] == [
        {"contender": each, "precision": "fp32", "steps": 3, "guided": False, "batch": 2}
        for each in (name, "PyTorch eager")
    ]
    for row in data["rows"]:
        metrics = row["metrics"]
        assert metrics["images_per_s"] == pytest.approx(2e3 / metrics["call_p50_ms"])
        assert metrics["call_p10_ms"] <= metrics["call_p50_ms"] <= metrics["call_p90_ms"]
        assert metrics["calls"] == 16
        assert metrics["first_call_s"] > 0
        assert metrics["psnr_db"] > 60
    (found,) = data["comparisons"]
    assert (found["variant"], found["baseline"], found["ratio"]["rounds"]) == ("PyTorch eager", name, 8)
    assert {"variant": "absent", "reason": "it is not installed"} in data["missing"]
    assert any("the bundle holds no classifier" in each["reason"] for each in data["missing"])
    assert (tmp_path / "peers.png").stat().st_size > 5000
    assert data["environment"]["threads"] == 1
    assert "the same images as ours in fp32" in capsys.readouterr().out


@pytest.mark.parametrize("shift", [0.1, float("nan")], ids=["too bright", "not a number"])
def test_wrong_images_turn_the_report_red(tmp_path, bundle, capsys, shift):
    def with_wrong(subject: Subject) -> list[Entrant]:
        right = eager_loop(subject)
        return [
            *few(subject)[:1],
            Entrant("wrong", lambda: dataclasses.replace(right, name="wrong", sample=spoilt(right))),
        ]

    def spoilt(right: Contender) -> Callable[[Task], Tensor]:
        return lambda task: (right.sample(task) + shift).clamp(-1, 1)

    assert run_peers(bundle, tmp_path, with_wrong) == EXIT_RED
    data = json.loads((tmp_path / "peers.json").read_text())
    check_schema(data)
    assert [check["name"] for check in data["checks"] if not check["passed"]] == [
        "wrong, 3 steps: the same images as ours in fp32, dB (fp32)"
    ]
    assert "FAILED: wrong" in capsys.readouterr().out


def test_half_precision_may_differ_by_more():
    wanted = torch.zeros(2, 1, 8, 8)
    assert not same_images("a", "fp32", wanted + 0.05, wanted)[1].passed
    assert same_images("a", "bf16", wanted + 0.05, wanted)[1].passed


def test_compiled_code_is_trusted_less_between_runs():
    """The same times, of a contender that is compiled in every run anew and of one that is not."""
    series = Series(1.0, (), np.random.default_rng(0).normal(100, 1, (20, 2)))
    contenders = {name: Contender(name, "fp32", lambda _: torch.zeros(1), is_compiled=name == "compiled") for name in
                  ("ours", "plain", "compiled")}  # fmt: skip
    measured = Measured(Task(3, False, (0,)), contenders, dict.fromkeys(contenders, series), {})
    plain, compiled = (each.ratio for each in make_comparisons(measured))
    assert plain.high / plain.low == pytest.approx(1.045**2, rel=1e-3)
    assert compiled.high / compiled.low == pytest.approx(1.14**2, rel=1e-3)


def test_images_are_asked_of_every_class_but_the_one_for_none(tmp_path, bundle):
    opened = Bundle.open(bundle)
    unet = random_network(opened.manifest.unet.config)
    subject = Subject(opened, unet, "no classifier was given", None, None, CPU, 5, None, tmp_path)
    assert subject.task(3, guided=False).classes == (0, 1, 2, 0, 1)
    guided = subject.task(3, guided=True)
    assert eager_loop(subject).reason_against(guided) == "no classifier was given"
    assert ours(subject, "eager").reason_against(guided) == "the bundle holds no classifier"


def test_ours_must_open(tmp_path, bundle, capsys):
    assert run_peers(bundle, tmp_path / "out", lambda subject: [Entrant(OURS, fails)]) == 2
    assert f"{OURS} does not open: it is not installed" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch", "0"), "--batch is 0; expected 1 or more"),
        (("--rounds", "7"), "--rounds is 7; expected 8 or more"),
        (("--steps", "500"), "500 steps asked for and the schedule has 100"),
        (("--classifier", "none.pt"), "holds no classifier"),
        (("--checkpoint", "none.pt"), "none.pt is no file"),
    ],
)
def test_bad_input(tmp_path, bundle, capsys, options, message):
    assert main([str(bundle), "--out", str(tmp_path / "out"), *options], few) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_the_files_beside_a_bundle_must_be_its_own(bundle):
    opened = Bundle.open(bundle)
    facts = {"family": "openai-guided", "num_head_channels": 32, "noise_schedule": "cosine"}
    shipped = load_checkpoint(CLASSIFIER, **facts)
    entry = ClassifierEntry(shipped.config, checkpoint_sha256=file_sha256(CLASSIFIER))  # type: ignore[arg-type]
    guided = dataclasses.replace(opened, manifest=with_classifier(opened.manifest, entry))
    found = read_classifier(guided, CLASSIFIER)
    assert not isinstance(found, str)
    assert found.config == shipped.config
    assert "--classifier" in str(read_classifier(guided, None))
    with pytest.raises(RequestError, match="is not the classifier in"):
        read_classifier(guided, CHECKPOINT)
    assert "holds no classifier" in str(read_classifier(opened, None))
    with pytest.raises(RequestError, match="is not what"):
        check_checkpoint(opened, CLASSIFIER)
    digits = dataclasses.replace(opened.manifest, checkpoint_sha256=file_sha256(CHECKPOINT))
    check_checkpoint(dataclasses.replace(opened, manifest=digits), CHECKPOINT)
