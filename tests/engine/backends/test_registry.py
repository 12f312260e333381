"""What the modules of engine.backends offer, and which of them a bundle is opened with."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import adm_unet, write_bundle

from engine.backends import eager, native, ort, ov, registry
from engine.backends.native.native_backend import NativeBackend
from engine.backends.native.native_guide import NativeGuide
from engine.backends.registry import BACKENDS, GUIDES, NAMES, libraries, open_backend, open_guide, preferred, variants
from engine.backends.requirements import missing_package
from engine.bundle.bundle_folder import Bundle
from engine.errors import BackendError, BundleError

CONFIG = adm_unet(mult=(1,), attention=())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Weights, and neither an ONNX file nor a plan."""
    return Bundle.open(write_bundle(tmp_path_factory.mktemp("bundle") / "net.engine", CONFIG))


def test_names_are_told_apart() -> None:
    assert len(set(NAMES)) == len(BACKENDS)
    assert set(GUIDES) <= set(BACKENDS)
    assert registry.AUTO not in NAMES
    assert native.NAME == NativeBackend.name == NativeGuide.name


def test_an_unknown_name_is_an_error_with_the_known_ones(bundle: Bundle) -> None:
    known = ", ".join(module.NAME for module in preferred())
    with pytest.raises(BackendError, match=f"unknown backend 'onnx'; known: auto, {known}"):
        open_backend(bundle, "onnx")


def test_every_reason_is_told(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="no backend can run this bundle here: ") as caught:
        open_backend(bundle, precision="int4")
    for module in BACKENDS:
        assert f"{module.NAME}: it offers {', '.join(module.precisions())}, not int4" in str(caught.value)


def test_reasons_are_the_bundles_and_the_machines(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert eager.reason_against(bundle, None) is None
    assert ort.reason_against(bundle, "fp16") == "the bundle holds no unet.fp16.onnx"
    assert ov.reason_against(bundle, None) == "the bundle holds no unet.onnx"
    assert native.reason_against(bundle, "int8") == "the bundle holds no unet.int8.json"
    monkeypatch.setattr(Bundle, "has", lambda *_: True)
    monkeypatch.setattr(ov, "_missing", lambda: missing_package("a_package_of_no_one", "cpu"))
    assert ov.reason_against(bundle, None) == "a_package_of_no_one is not installed (pip install 'unet-rt[cpu]')"
    assert ov.guide_reason_against(bundle) == ov.reason_against(bundle, "bf16")
    assert missing_package("torch", "cpu") is None


def test_the_log_says_what_was_opened(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the precision that the backend took, which for a plan is the bundle's and not the first that is offered."""
    opened = SimpleNamespace(name="a", precision="bf16")
    able = SimpleNamespace(
        NAME="a", precisions=lambda: ("fp16", "bf16"), reason_against=lambda *_: None, open=lambda *_: opened
    )
    unable = SimpleNamespace(NAME="b", precisions=lambda: ("fp32",), reason_against=lambda *_: "it is out of order")
    monkeypatch.setattr(registry, "preferred", lambda: (unable, able))
    monkeypatch.setattr(registry, "NAMES", ("a", "b"))
    with caplog.at_level(logging.INFO):
        assert open_backend(bundle) is opened
        assert open_backend(bundle, "a") is opened
    assert caplog.messages == ["backend a in bf16 (b: it is out of order)", "backend a in bf16"]


def test_what_a_machine_offers() -> None:
    offered = variants()
    assert len(set(offered)) == len(offered)
    assert {name for name, _ in offered} == set(NAMES)
    assert offered[0][0] == ("trt" if torch.cuda.is_available() else "native")
    assert ("eager", "fp32") in offered


def test_libraries_that_decide_the_rounding() -> None:
    assert libraries("ort") == ("onnxruntime", "onnxruntime-gpu")
    assert libraries("eager") == libraries("one of the caller's own") == ()


def test_a_guide_needs_a_classifier(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="holds no classifier; pass its file with --classifier, or build"):
        open_guide(bundle)
