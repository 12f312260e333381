"""A bundle that was changed, cut, forged or made by a newer version is refused with the remedy."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import with_classifier, with_unet

from engine.bundle.bundle_folder import Bundle, is_bundle
from engine.bundle.file_names import MANIFEST
from engine.bundle.manifest import (
    FORMAT_VERSION,
    ClassifierEntry,
    Manifest,
    Measurement,
    NetworkEntry,
    Networks,
    PlanEntry,
)
from engine.diffusion.prediction import Diffusion
from engine.diffusion.schedule import linear_schedule
from engine.errors import BundleError, ConfigError
from engine.networks.config import AveragePool, ClassifierConfig, Conv, TimeConfig, UNetConfig

FILES = {
    "classifier.onnx": b"a gradient",
    "unet.onnx": b"an ONNX file",
    "unet.onnx.data": b"more of the ONNX file",
    "unet.rtx.plan": b"a plan",
    "unet.safetensors": b"weights",
}
TIME = TimeConfig(4, 8)
PLAN = PlanEntry("unet.rtx.plan", "tensorrt_rtx", "1.7", ("sm86", "sm89"), (1, 8, 64), "fp16")
MEASURED = Measurement("unet.onnx", "onnxruntime cpu", "fp32", 1e-6, 1e-7, 1.0, 1e-4, "blocks.0 Conv", 1e-7)
CLASSIFIER = ClassifierEntry(
    ClassifierConfig(1, (8, 8), TIME, (AveragePool(1, 3),), 3),
    {"classifier.onnx": "fp32 throughout"},
    checkpoint_sha256="11" * 32,
    assumptions=(("image_size", [8, 8], "the network's"),),
    gain=2.0**-12,
)
MANIFEST_OF_FILES = Manifest(
    family="openai-guided",
    networks=Networks(
        NetworkEntry(
            UNetConfig(1, 1, (8, 8), TIME, (Conv(1, 1),)),
            {"unet.onnx": "fp32 throughout"},
            fp32_parts=(("blocks.0", "too large"),),
            plans=(PLAN,),
            verification=(MEASURED,),
        ),
        CLASSIFIER,
    ),
    diffusion=Diffusion(linear_schedule(100)),
    checkpoint_sha256="00" * 32,
    assumptions=(("num_heads", 4, "the default"),),
    versions={"torch": "2.13.0"},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle whose files are not networks; nothing here runs them."""
    return make_folder(tmp_path / "net.engine", MANIFEST_OF_FILES)


def make_folder(path: Path, manifest: Manifest) -> Path:
    path.mkdir()
    for name, content in FILES.items():
        (path / name).write_bytes(content)
    Bundle.write(path, manifest)
    return path


def forge(folder: Path, **changes: object) -> None:
    """Rewrite the manifest with a matching hash of its own, as another program would."""
    data = json.loads((folder / MANIFEST).read_text()) | changes
    data.pop("manifest_sha256")
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
    data["manifest_sha256"] = hashlib.sha256(canonical).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(data))


def flip_a_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_what_is_written_is_read_back(folder):
    opened = Bundle.open(folder)
    opened.verify()
    assert set(opened.manifest.files) == set(FILES)
    assert opened.file("unet.onnx").read_bytes() == FILES["unet.onnx"]
    again = make_folder(folder.parent / "again", opened.manifest)
    assert (again / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()
    assert opened.manifest.networks == MANIFEST_OF_FILES.networks
    assert opened.manifest.unet.verification[0].passed
    assert opened.manifest.classifier == CLASSIFIER
    assert list(opened.manifest.networks.named()) == ["unet", "classifier"]


def test_networks_stand_under_their_names(folder):
    networks = json.loads((folder / MANIFEST).read_text())["networks"]
    assert set(networks) == {"unet", "classifier"}
    assert networks["unet"]["config"]["blocks"] == [{"type": "conv", "in_channels": 1, "out_channels": 1, "kernel": 3}]
    assert networks["classifier"]["gain"] == 2.0**-12


def test_a_bundle_without_a_classifier(tmp_path):
    path = make_folder(tmp_path / "net.engine", with_classifier(MANIFEST_OF_FILES, None))
    assert Bundle.open(path).manifest.classifier is None
    assert list(json.loads((path / MANIFEST).read_text())["networks"]) == ["unet"]


@pytest.mark.parametrize("name", ["notes.txt", "unet.fp16.onnx", ".hidden"])
def test_file_that_is_not_listed(folder, name):
    (folder / name).write_bytes(b"")
    message = rf"{re.escape(name)} is not listed in the bundle's manifest; remove it, or build it again with"
    with pytest.raises(BundleError, match=message):
        Bundle.open(folder)


@pytest.mark.parametrize("name", ["unet.onnx", "unet.rtx.plan", "classifier.onnx"])
def test_network_with_a_file_that_is_not_listed(folder, name):
    (folder / name).unlink()
    Bundle.write(folder, MANIFEST_OF_FILES)
    with pytest.raises(BundleError, match=rf"{name.split('.')[0]} is said to have {name}, which is not listed"):
        Bundle.open(folder)


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
    path = folder / MANIFEST
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
    path = folder / MANIFEST
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(BundleError, match=r"manifest.json is damaged .*build it again"):
        Bundle.open(folder)


@pytest.mark.parametrize("content", [b"[]", b"3", b'"text"', b"{}", b"\xff\xfe", b"null"])
def test_manifest_that_is_something_else(folder, content):
    (folder / MANIFEST).write_bytes(content)
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
        BundleError, match=r"made by a newer version \(format 3, this version reads 2\); upgrade with: pip install"
    ):
        Bundle.open(folder)


@pytest.mark.parametrize(
    ("files", "plans", "command"),
    [
        (["unet.onnx"], [], r"python -m export.to_onnx CHECKPOINT --out \S+net.engine and the options"),
        (["unet.onnx", "unet.fp16.onnx"], [], r"python -m export.to_trt CHECKPOINT --out \S+net.engine and"),
        (["unet.onnx"], [{"file": "unet.rtx.plan"}], r"python -m export.to_trt CHECKPOINT --out \S+net.engine and"),
        (
            ["unet.int8.json", "classifier.onnx"],
            [],
            r"to_onnx CHECKPOINT --out \S+ --native-int8 --classifier FILE and",
        ),
    ],
)
def test_format_1(folder, files, plans, command):
    data = {"format_version": 1, "checkpoint_sha256": "ab" * 32, "files": dict.fromkeys(files), "plans": plans}
    (folder / MANIFEST).write_text(json.dumps(data | {"manifest_sha256": "00" * 32}))
    message = rf"made by an earlier version \(format 1, this version reads 2\).*sha256 {'ab' * 32} with: .*{command}"
    with pytest.raises(BundleError, match=message):
        Bundle.open(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "a/b", ""])
def test_path_outside_the_bundle(folder, name):
    forge(folder, files={name: {"sha256": "00" * 32, "size_bytes": 1}})
    with pytest.raises(BundleError, match=r"lists the path .* outside the bundle; do not use it"):
        Bundle.open(folder)


def at(data: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """The object that holds the field of a path such as "networks.unet.config", and the field's name."""
    *parents, field = path.split(".")
    for name in parents:
        data = data[name]
    return data, field


FIELDS = (
    "family", "networks", "networks.unet", "networks.unet.config", "networks.unet.config.time",
    "networks.unet.config.blocks", "networks.unet.config.cond_channels", "networks.unet.files", "networks.unet.plans",
    "networks.unet.verification", "networks.classifier.checkpoint_sha256", "diffusion", "diffusion.schedule",
    "diffusion.schedule.timesteps", "diffusion.clip", "files", "versions", "checkpoint_sha256", "assumptions",
)  # fmt: skip


@pytest.mark.parametrize("path", FIELDS)
def test_missing_field(folder, path):
    data = json.loads((folder / MANIFEST).read_text())
    parent, field = at(data, path)
    del parent[field]
    (folder / MANIFEST).write_text(json.dumps(data))
    forge(folder)
    message = rf"manifest.json is wrong or incomplete: this is no Manifest: .*[`'\"]{field}[`'\"].*build it again"
    with pytest.raises(BundleError, match=message):
        Bundle.open(folder)


@pytest.mark.parametrize("path", ["more", "networks.decoder", "networks.unet.config.width", "diffusion.more"])
def test_unknown_field(folder, path):
    data = json.loads((folder / MANIFEST).read_text())
    parent, field = at(data, path)
    parent[field] = 1
    (folder / MANIFEST).write_text(json.dumps(data))
    forge(folder)
    with pytest.raises(BundleError, match=rf"this is no Manifest: \$.* has the unknown field '{field}'"):
        Bundle.open(folder)


@pytest.mark.parametrize("value", [3, "text", [1], {"a": []}])
@pytest.mark.parametrize("path", [path for path in FIELDS if path not in ("family", "checkpoint_sha256")])
def test_fields_of_another_type(folder, path, value):
    data = json.loads((folder / MANIFEST).read_text())
    parent, field = at(data, path)
    is_right = {"diffusion.clip": 3, "networks.unet.config.cond_channels": 3}.get(path) == value
    parent[field] = value
    (folder / MANIFEST).write_text(json.dumps(data))
    forge(folder)
    if is_right and path == "diffusion.clip":
        assert Bundle.open(folder).manifest.diffusion.clip == 3.0
        return
    if path.endswith("checkpoint_sha256") and value == "text":
        return
    with pytest.raises(BundleError, match=r"manifest.json is wrong or incomplete"):
        Bundle.open(folder)


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
    bad = dataclasses.replace(manifest.unet.verification[0], rms=float("nan"))
    assert not bad.passed
    with pytest.raises(ConfigError, match=r"\$.networks.unet.verification\[0\].rms is nan; a finite number"):
        Bundle.write(folder, with_unet(manifest, verification=(bad,)))


def test_nan_is_not_read_from_a_manifest(folder):
    data = json.loads((folder / MANIFEST).read_text())
    data["networks"]["unet"]["verification"][0]["rms"] = float("nan")
    (folder / MANIFEST).write_text(json.dumps(data))
    forge(folder)
    with pytest.raises(BundleError, match=r"\$.networks.unet.verification\[0\].rms is nan"):
        Bundle.open(folder)
