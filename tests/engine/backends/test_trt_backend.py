"""engine.backends.trt over a TensorRT of our own on the CPU, and what the real one says without a GPU."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import trt_fakes
from elementwise import LABELLED, PLAIN, CountingGuide, Elementwise
from graph_cases import SAME
from helpers import adm_classifier, call_main, tiny_manifest, with_classifier, with_unet, write_bundle
from trt_fakes import VERSION, AlignedDevice, fake_library, write_plan

from engine.backends.registry import open_backend, open_guide, preferred
from engine.backends.trt.trt_backend import TrtBackend, TrtGuide
from engine.backends.trt.trt_library import Library, Plans, cache_folder, find_plans, load_library
from engine.backends.trt.trt_log import make_log
from engine.bundle.bundle_folder import Bundle
from engine.bundle.manifest import ClassifierEntry, PlanEntry
from engine.device import CpuDevice, CudaDevice
from engine.diffusion.guidance import ClassifierGuidance
from engine.errors import BackendError
from engine.networks.inputs import Conditions
from engine.sampling.pool import SlotPool
from engine.sampling.sampler import Sampler

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
CLASSIFIER = ClassifierEntry(adm_classifier(mult=(1,), size=(4, 4)), checkpoint_sha256="00" * 32)
SHAPES = {"x_t": [-1, 1, 4, 4], "timestep": [-1], "label": [-1]}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def entry(file: str, profile: tuple[int, int, int], **changes: Any) -> PlanEntry:
    return dataclasses.replace(PlanEntry(file, "tensorrt_rtx", VERSION, ("sm86", "sm89"), profile, "fp16"), **changes)


def make_bundle(folder: Path, profiles: list[tuple[int, int, int]], guide: bool = False) -> Bundle:
    """A bundle whose plans the fake library runs: one a profile, and one of a classifier."""
    folder.mkdir()
    entries = []
    for number, profile in enumerate(profiles):
        entries.append(entry(f"unet.{number}.rtx.plan", profile))
        write_plan(folder / entries[-1].file, "unet", profile, SHAPES, {"out": [-1, 2, 4, 4]})
    manifest = tiny_manifest(LABELLED)
    if guide:
        plan = entry("classifier.rtx.plan", (1, 4, 4))
        outputs = {"grad": [-1, 1, 4, 4], "log_p": [-1]}
        write_plan(folder / plan.file, "classifier", (1, 4, 4), SHAPES | {"scale": [-1]}, outputs)
        manifest = with_classifier(manifest, dataclasses.replace(CLASSIFIER, plans=(plan,)))
    Bundle.write(folder, with_unet(manifest, plans=tuple(entries)))
    return Bundle.open(folder)


def networks() -> dict[str, Any]:
    unet, guide = Elementwise(LABELLED), CountingGuide()

    def gradient(b: Any) -> Any:
        grad, log_p = guide(b["x_t"], b["timestep"], b["label"], b["scale"])
        return {"grad": grad, "log_p": log_p}

    return {"unet": lambda b: {"out": unet(b["x_t"], b["timestep"], Conditions(b["label"]))}, "classifier": gradient}


def opened(bundle: Bundle, library: Library, device: Any, network: str = "unet") -> Plans:
    return find_plans(bundle, network, None, lambda _name: library, "sm89")


def inputs(count: int, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
    x = torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(count))
    return x, torch.arange(count).float() + offset, Conditions(torch.arange(count) % 10)


BUCKETS = [(1, 1, 1), (2, 2, 2), (4, 4, 4), (8, 8, 8)]


@pytest.mark.parametrize("profiles", [BUCKETS, [(1, 8, 20)], [(3, 4, 4)]], ids=["buckets", "dynamic", "least 3"])
@pytest.mark.parametrize("count", [1, 3, 8, 11, 41])
def test_any_batch(tmp_path, profiles, count):
    """Padded to a batch of a plan, or split where it is larger; the result is that of each image."""
    bundle, library, device = make_bundle(tmp_path / "b", profiles), fake_library(networks()), AlignedDevice()
    backend = TrtBackend(bundle, None, opened(bundle, library, device), device)
    assert (backend.name, backend.precision) == ("trt", "fp16")
    for _ in range(2):
        got = backend(*inputs(count))
        assert torch.equal(got, Elementwise(LABELLED)(*inputs(count)))
    allocated = len(device.allocated)
    backend(*inputs(count))
    assert len(device.allocated) == allocated
    first = got.clone()
    backend(*inputs(count, offset=1))
    assert torch.equal(got, first), "a result must not change with the next call"
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend(*inputs(count))


def test_batches_of_the_plans():
    plans = Plans(fake_library({}), tuple(entry("unet.plan", p) for p in BUCKETS))
    assert [plans.pieces(n) for n in (1, 2, 3, 8, 9, 13, 21)] == [[1], [2], [4], [8], [8, 1], [8, 8], [8, 8, 8]]
    assert [plans.entry_for(n).batch_profile[2] for n in (1, 2, 4, 8)] == [1, 2, 4, 8]
    dynamic = Plans(fake_library({}), (entry("unet.plan", (1, 8, 64)),))
    assert [dynamic.pieces(n) for n in (3, 8, 9, 33, 64, 70)] == [[4], [8], [16], [40], [64], [64, 8]]
    odd = Plans(fake_library({}), (entry("unet.plan", (3, 4, 20)),))
    for chosen in (plans, dynamic, odd):
        for n in range(1, 200):
            total = sum(chosen.pieces(n))
            assert total >= n
            assert sum(chosen.pieces(total)) == total
    mixed = Plans(fake_library({}), (entry("unet.a", (1, 8, 64)), entry("unet.b", (8, 8, 8))))
    assert [mixed.entry_for(n).file for n in (4, 8, 16)] == ["unet.a", "unet.b", "unet.a"]


@pytest.mark.parametrize("profiles", [BUCKETS, [(1, 8, 20)]], ids=["buckets", "dynamic"])
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 3.0}, {"sampler": "ddpm"}], ids=["plain", "cfg", "ddpm"])
def test_the_sampler_on_plans(tmp_path, profiles, options):
    """Through the step program, with the classifier's plan in it: the images of the host's slots."""
    bundle, library = make_bundle(tmp_path / "b", profiles, guide=True), fake_library(networks())
    device = AlignedDevice()
    backend = TrtBackend(bundle, None, opened(bundle, library, device), device)
    guide = TrtGuide(bundle.manifest.classifier.config, bundle, opened(bundle, library, device, "classifier"), device)
    backend.device = guide.device = torch.device("cuda")
    sampler = Sampler(backend)
    sampler._pool = SlotPool(backend, lambda: device)
    for guidance in (None, guide):
        given = options | {"guidance": guidance and ClassifierGuidance(guidance, 0.5)}
        expected = Sampler(Elementwise(LABELLED)).sample(6, steps=5, labels=3, batch_size=5, **given)
        got = sampler.sample(6, steps=5, labels=3, batch_size=5, **given)
        torch.testing.assert_close(got, expected, **SAME)
    assert device.captures >= 2
    assert any("gradient" in str(slots.captured) for slots in sampler._pool._idle.values())


def test_one_context_a_batch_and_shared_memory(tmp_path):
    bundle, library, device = make_bundle(tmp_path / "b", [(1, 8, 20)]), fake_library(networks()), AlignedDevice()
    backend = TrtBackend(bundle, None, opened(bundle, library, device), device)
    for count in (8, 7, 5, 3, 8, 4):
        backend(*inputs(count))
    (engine,) = library.trt.engines
    assert [context.batch for context in engine.contexts] == [8, 4]
    assert engine.contexts[0].size == engine.contexts[1].size
    assert {config.cache for config in library.trt.configs} == {library.trt.configs[0].cache}


def test_a_context_that_cannot_be_captured(tmp_path, caplog):
    """Sampling goes on without a graph, and says so."""
    bundle, library, device = make_bundle(tmp_path / "b", BUCKETS), fake_library(networks()), AlignedDevice()
    library.trt.is_capturable = False
    backend = TrtBackend(bundle, None, opened(bundle, library, device), device)
    backend.device = torch.device("cuda")
    sampler = Sampler(backend)
    sampler._pool = SlotPool(backend, lambda: device)
    sampler.sample(2, steps=4, labels=1)
    assert device.captures == 0
    assert "cannot be captured" in caplog.text


def test_a_call_that_fails(tmp_path):
    bundle, library, device = make_bundle(tmp_path / "b", BUCKETS), fake_library(networks()), AlignedDevice()
    backend = TrtBackend(bundle, None, opened(bundle, library, device), device)
    library.trt.runs = False
    library.log.log(2, "out of memory in myelin")
    with pytest.raises(BackendError, match="could not run the plan: .*out of memory in myelin; check the GPU"):
        backend(*inputs(2))


def test_a_plan_without_weights_takes_them_from_the_onnx_file(tmp_path):
    bundle, library = make_bundle(tmp_path / "b", [(1, 1, 1)]), fake_library(networks(), "tensorrt")
    for content, outcome in ((b"the weights", None), (b"others", "cannot give .* of unet.fp16.onnx: a weight is miss")):
        (bundle.path / "unet.fp16.onnx").write_bytes(content)
        plan = dataclasses.replace(bundle.manifest.unet.plans[0], weights_file="unet.fp16.onnx")
        Bundle.write(bundle.path, with_unet(bundle.manifest, plans=(plan,)))
        bundle = Bundle.open(bundle.path)
        if outcome is None:
            TrtBackend(bundle, None, opened(bundle, library, AlignedDevice()), AlignedDevice())
            assert library.trt.engines[-1].weights == content
        else:
            with pytest.raises(BackendError, match=outcome):
                TrtBackend(bundle, None, opened(bundle, library, AlignedDevice()), AlignedDevice())


def test_a_plan_of_another_type_is_refused(tmp_path, monkeypatch):
    bundle, library, device = make_bundle(tmp_path / "b", BUCKETS), fake_library(networks()), AlignedDevice()
    backend = TrtBackend(bundle, None, opened(bundle, library, device), device)
    buffers = {name: torch.zeros(2, *shape[1:]) for name, shape in (SHAPES | {"out": [-1, 2, 4, 4]}).items()}
    with pytest.raises(BackendError, match=r"takes torch.int64 as label, not torch.float32; build it again with"):
        backend.bind(buffers)
    monkeypatch.setattr(trt_fakes.ICudaEngine, "get_tensor_dtype", lambda *_: trt_fakes.DataType.HALF)
    with pytest.raises(BackendError, match=r"unet\.\d\.rtx\.plan holds x_t as .*HALF; expected float32"):
        backend(*inputs(2))


def test_compiled_kernels_are_kept(tmp_path, caplog):
    """Written once after the first call, read by the next start, ignored and written anew where they do not fit."""
    caplog.set_level(logging.INFO)
    bundle = make_bundle(tmp_path / "b", [(1, 8, 20)])
    for _ in range(2):
        library, device = fake_library(networks()), AlignedDevice()
        TrtBackend(bundle, None, opened(bundle, library, device), device)(*inputs(2))
        (kept,) = cache_folder().iterdir()
        assert kept.read_bytes() == b"compiled here"
        assert kept.stem == bundle.manifest.files["unet.0.rtx.plan"].sha256
    assert "not used" not in caplog.text
    kept.write_bytes(b"of another GPU")
    TrtBackend(bundle, None, opened(bundle, library, device), device)(*inputs(2))
    assert "not used" in caplog.text
    assert kept.read_bytes() == b"compiled here"


def test_a_cache_folder_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    bundle, library, device = make_bundle(tmp_path / "b", [(1, 8, 20)]), fake_library(networks()), AlignedDevice()
    TrtBackend(bundle, None, opened(bundle, library, device), device)(*inputs(2))
    assert "not kept for the next start" in caplog.text


def test_refused_plans(tmp_path):
    bundle, library, device = make_bundle(tmp_path / "b", [(1, 8, 20)]), fake_library(networks()), AlignedDevice()
    plans = opened(bundle, library, device)
    for outputs, shapes, message in (
        ({"out": [-1, 2, 4, 4]}, SHAPES | {"beta": [-1]}, "has tensors .*beta.*, not ours"),
        ({"out": [-1, 2, 4, 4]}, {"x_t": [-1, 1, 4, 4]}, None),
    ):
        write_plan(bundle.path / "unet.0.rtx.plan", "unet", (1, 8, 20), shapes, outputs)
        Bundle.write(bundle.path, bundle.manifest)
        if message is not None:
            with pytest.raises(BackendError, match=message):
                TrtBackend(Bundle.open(bundle.path), None, plans, device)
    (bundle.path / "unet.0.rtx.plan").write_bytes(b"\0garbage")
    Bundle.write(bundle.path, bundle.manifest)
    with pytest.raises(BackendError, match="cannot load unet.0.rtx.plan: magic tag does not match; check the driver"):
        TrtBackend(Bundle.open(bundle.path), None, plans, device)


FITTING = {
    "--target sm90": {"capability": "sm90"},
    "was built by tensorrt_rtx 1.7.1 and 1.8.0 is installed; build it again": {"version": "1.8.0"},
    r"not installed; pip install 'unet-rt\[trt\]'": {"installed": False},
    "its plans are fp16; build others with: .* --precision bf16": {"precision": "bf16"},
    "holds no TensorRT plan of its classifier; build it with": {"network": "classifier"},
}


@pytest.mark.parametrize("message", FITTING)
def test_what_does_not_fit_names_its_remedy(tmp_path, message):
    case = {"capability": "sm89", "installed": True, "precision": None, "network": "unet"} | FITTING[message]
    library = fake_library({})
    library.trt.__version__ = case.get("version", VERSION)
    bundle = make_bundle(tmp_path / "b", [(1, 8, 20)])
    with pytest.raises(BackendError, match=message):
        find_plans(
            bundle, case["network"], case["precision"], lambda _: library if case["installed"] else None,
            case["capability"],
        )  # fmt: skip


def test_data_centre_plans_come_first(tmp_path):
    bundle = make_bundle(tmp_path / "b", [(1, 8, 20)])
    more = entry("unet.trt.sm89.plan", (1, 8, 64), library="tensorrt", targets=("sm89",))
    manifest = with_unet(bundle.manifest, plans=(*bundle.manifest.unet.plans, more))
    both = Bundle(bundle.path, manifest)
    found = find_plans(both, "unet", None, lambda name: fake_library({}, name), "sm89")
    assert (found.library.name, found.entries) == ("tensorrt", (more,))
    assert find_plans(both, "unet", None, lambda name: fake_library({}, name), "sm86").library.name == "tensorrt_rtx"


@pytest.mark.trt
@pytest.mark.parametrize("name", ["Runtime", "ICudaEngine", "IExecutionContext", "IRuntimeConfig", "IRuntimeCache"])
def test_the_fake_has_no_name_that_the_library_lacks(name):
    library = load_library("tensorrt_rtx") or load_library("tensorrt")
    used = [n for n, f in vars(getattr(trt_fakes, name)).items() if inspect.isfunction(f) or isinstance(f, property)]
    lacking = [
        n for n in used if not n.startswith("_") and n not in ("batch",) and not hasattr(getattr(library.trt, name), n)
    ]
    assert not lacking
    assert {"USER_MANAGED"} <= set(library.trt.ExecutionContextAllocationStrategy.__members__)
    if hasattr(library.trt, "CudaGraphStrategy"):
        assert "DISABLED" in library.trt.CudaGraphStrategy.__members__
        assert "EAGER" in library.trt.DynamicShapesKernelSpecializationStrategy.__members__
        assert hasattr(library.trt.IRuntimeConfig, "cuda_graph_strategy")


@pytest.mark.trt
@NO_GPU
def test_the_real_library_says_why_it_loads_nothing(tmp_path):
    library = load_library("tensorrt_rtx")
    bundle = make_bundle(tmp_path / "b", [(1, 8, 20)])
    with pytest.raises(BackendError, match=r"tensorrt_rtx [\d.]+ cannot load unet.0.rtx.plan: .+; check the driver"):
        TrtBackend(bundle, None, Plans(library, bundle.manifest.unet.plans), CpuDevice())


@NO_GPU
def test_without_a_gpu(tmp_path):
    """One line that says what is missing, and exit status 2."""
    bundle = make_bundle(tmp_path / "b", [(1, 8, 20)], guide=True)
    with pytest.raises(BackendError, match="trt: the trt backend needs an NVIDIA GPU: .*or choose a CPU backend"):
        open_backend(bundle, "trt")
    with pytest.raises(BackendError, match="needs an NVIDIA GPU"):
        CudaDevice()
    with pytest.raises(BackendError, match="needs an NVIDIA GPU"):
        TrtGuide(bundle.manifest.classifier.config, bundle)
    without = write_bundle(tmp_path / "c", PLAIN)
    for arguments, words in (
        ((bundle.path, "--backend", "trt"), "needs an NVIDIA GPU"),
        ((without, "--backend", "trt"), "holds no TensorRT plan of its unet; build it with: python -m export.to_trt"),
        ((without, "--backend", "eager", "--precision", "fp16"), "fp16"),
    ):
        outcome = call_main("sample", *arguments, "-n", 1, "--out", tmp_path / "out")
        assert words in outcome.error
        assert outcome.error.strip().count("\n") == 0
        assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_native_engine")
def test_auto_on_a_cpu_takes_no_plan(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("is about a machine without a GPU")
    assert open_backend(write_bundle(tmp_path / "c", PLAIN)).name == "eager"


def test_auto_on_a_gpu_tries_plans_first(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [module.NAME for module in preferred()] == ["trt", "eager", "ort", "ov", "native"]


def test_a_classifier_without_a_plan_beside_trt(tmp_path, caplog):
    """It runs in another library, with a warning that it is slower."""
    bundle = make_bundle(tmp_path / "b", [(1, 8, 20)])
    manifest = with_classifier(bundle.manifest, CLASSIFIER)
    with pytest.raises(Exception, match="classifier.onnx"):
        open_guide(Bundle(bundle.path, manifest), "trt")
    assert "the classifier cannot run on trt as the network does, which is slower: " in caplog.text


def test_the_log_keeps_warnings_and_errors():
    log = make_log(fake_library({}).trt)
    for severity, line in ((1, "error"), (2, "warning"), (3, "info")):
        log.log(severity, line)
    assert list(log.lines) == ["error", "warning"]
