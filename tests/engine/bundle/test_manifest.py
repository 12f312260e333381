"""A bundle that was changed, cut, forged or made by a newer version is refused with the remedy."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from engine.bundle.folder import Bundle, is_bundle, write_manifest
from engine.bundle.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, Measurement, PlanEntry
from engine.diffusion.prediction import Diffusion
from engine.diffusion.schedule import linear_schedule
from engine.errors import BundleError
from engine.networks.config import Conv, UNetConfig

FILES = {"unet.onnx": b"an ONNX file", "unet.safetensors": b"weights", "unet.onnx.data": b"more of the ONNX file"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle whose files are not networks; nothing here runs them."""
    path = tmp_path / "net.engine"
    path.mkdir()
    for name, content in FILES.items():
        (path / name).write_bytes(content)
    manifest = Manifest(
        family="openai-guided",
        config=UNetConfig(1, 1, (8, 8), 4, 8, (Conv(1, 1),)),
        diffusion=Diffusion(linear_schedule(100)),
        checkpoint_sha256="00" * 32,
        assumptions=(("num_heads", 4, "the default"),),
        plans=(PlanEntry("unet.rtx.plan", "tensorrt_rtx", "1.7", ("sm86", "sm89"), (1, 8, 64), "fp16"),),
        precision={"unet.onnx": "fp32 throughout"},
        verification=(
            Measurement("unet.onnx", "onnxruntime cpu", "fp32", 1e-6, 1e-7, 1.0, 1e-4, "blocks.0 Conv", 1e-7),
        ),
        versions={"torch": "2.13.0"},
    )
    write_manifest(path, manifest)
    return path


def forge(folder: Path, **changes: object) -> None:
    """Rewrite the manifest with a matching hash of its own, as another program would."""
    data = json.loads((folder / MANIFEST_NAME).read_text()) | changes
    data.pop("manifest_sha256")
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
    data["manifest_sha256"] = hashlib.sha256(canonical).hexdigest()
    (folder / MANIFEST_NAME).write_text(json.dumps(data))


def flip_a_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_what_is_written_is_read_back(folder):
    opened = Bundle.open(folder)
    opened.verify()
    assert set(opened.manifest.files) == set(FILES)
    assert opened.file("unet.onnx").read_bytes() == FILES["unet.onnx"]
    again = folder.parent / "again"
    again.mkdir()
    for name, content in FILES.items():
        (again / name).write_bytes(content)
    write_manifest(again, opened.manifest)
    assert (again / MANIFEST_NAME).read_bytes() == (folder / MANIFEST_NAME).read_bytes()
    assert opened.manifest.verification[0].passed
    assert opened.manifest.plans[0].targets == ("sm86", "sm89")


@pytest.mark.parametrize("name", FILES)
def test_one_byte_changed_in_a_file(folder, name):
    flip_a_byte(folder / name, 3)
    with pytest.raises(BundleError, match=rf"{name} was changed .*sha256.*python -m export.to_trt CHECKPOINT"):
        Bundle.open(folder).file(name)
    with pytest.raises(BundleError, match=f"{name} was changed"):
        Bundle.open(folder).verify()


def test_external_weights_are_checked_with_their_onnx_file(folder):
    flip_a_byte(folder / "unet.onnx.data", 3)
    with pytest.raises(BundleError, match=r"unet.onnx.data was changed"):
        Bundle.open(folder).file("unet.onnx")


def test_any_byte_changed_in_the_manifest(folder):
    path = folder / MANIFEST_NAME
    whole = path.read_bytes()
    for position in range(0, len(whole) - 1, max(1, len(whole) // 97)):
        flip_a_byte(path, position)
        if json_or_none(path) != json.loads(whole):
            with pytest.raises(BundleError, match=r"damaged|was changed|newer version") as caught:
                Bundle.open(folder)
            assert str(folder) in str(caught.value)
        path.write_bytes(whole)


def json_or_none(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


@pytest.mark.parametrize("length", [0, 1, 100])
def test_truncated_manifest(folder, length):
    path = folder / MANIFEST_NAME
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(BundleError, match=r"manifest.json is damaged .*build it again"):
        Bundle.open(folder)


@pytest.mark.parametrize("content", [b"[]", b"3", b'"text"', b"{}", b"\xff\xfe", b"null"])
def test_manifest_that_is_something_else(folder, content):
    (folder / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(BundleError, match=r"damaged .*build it again"):
        Bundle.open(folder)


def test_missing_file(folder):
    (folder / "unet.onnx").unlink()
    with pytest.raises(BundleError, match=r"unet.onnx is missing although the manifest lists it; build it again"):
        Bundle.open(folder).file("unet.onnx")


def test_file_that_was_never_built(folder):
    with pytest.raises(BundleError, match=r"holds no unet.fp16.onnx; build it again with: python -m export.to_trt"):
        Bundle.open(folder).file("unet.fp16.onnx")


def test_link_in_place_of_a_file(folder, tmp_path):
    (tmp_path / "elsewhere").write_bytes(FILES["unet.onnx"])
    (folder / "unet.onnx").unlink()
    (folder / "unet.onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="unet.onnx is missing"):
        Bundle.open(folder).file("unet.onnx")


def test_newer_version(folder):
    forge(folder, format_version=FORMAT_VERSION + 1, something_new=True)
    with pytest.raises(
        BundleError, match=r"made by a newer version \(format 2, .*up to 1\); upgrade with: pip install"
    ):
        Bundle.open(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "a/b", ""])
def test_path_outside_the_bundle(folder, name):
    forge(folder, files={name: {"sha256": "00" * 32, "size_bytes": 1}})
    with pytest.raises(BundleError, match=r"lists the path .* outside the bundle; do not use it"):
        Bundle.open(folder)


@pytest.mark.parametrize("field", ["family", "config", "diffusion", "files", "plans", "verification", "precision"])
def test_incomplete_manifest(folder, field):
    data = json.loads((folder / MANIFEST_NAME).read_text())
    del data[field]
    (folder / MANIFEST_NAME).write_text(json.dumps(data))
    forge(folder)
    data = json.loads((folder / MANIFEST_NAME).read_text())
    with pytest.raises(BundleError, match=r"manifest.json is (incomplete|damaged).*build it again"):
        Bundle.open(folder)


@pytest.mark.parametrize("value", [None, 3, "text", [1]])
def test_fields_of_another_type(folder, value):
    for field in ("config", "diffusion", "files", "plans", "verification"):
        before = (folder / MANIFEST_NAME).read_bytes()
        forge(folder, **{field: value})
        with pytest.raises(BundleError, match=r"manifest.json is (incomplete|damaged)"):
            Bundle.open(folder)
        (folder / MANIFEST_NAME).write_bytes(before)


def test_folder_that_is_none(tmp_path):
    with pytest.raises(BundleError, match=r"is not a folder; pass a bundle, or make one with"):
        Bundle.open(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="is not a folder"):
        Bundle.open(tmp_path / "file")


def test_folder_without_a_manifest(tmp_path):
    assert not is_bundle(tmp_path)
    with pytest.raises(BundleError, match=r"is no bundle: it has no manifest.json"):
        Bundle.open(tmp_path)


def test_opening_writes_nothing(folder):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    Bundle.open(folder).verify()
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_nan_never_reaches_a_manifest(folder):
    manifest = Bundle.open(folder).manifest
    bad = dataclasses.replace(manifest.verification[0], rms=float("nan"))
    assert not bad.passed
    with pytest.raises(ValueError, match="nan"):
        write_manifest(folder, dataclasses.replace(manifest, verification=(bad,)))
