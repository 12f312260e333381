"""docs/extend/backend.md, followed to the letter in a copy of the sources."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_imports
from helpers import FP32_OTHER_ORDER, adm_unet, random_network, tiny_manifest, write_bundle

from engine.bundle.bundle_folder import Bundle
from engine.bundle.file_names import UNET, onnx_name
from export.to_onnx import export_onnx

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "extend" / "backend.md").read_text(encoding="utf-8")

# What a user does with the new backend, in a process that has the copy alone.
# An editable install of this checkout has a finder in front of PYTHONPATH.
USE = """
import json, logging, sys
sys.meta_path = [finder for finder in sys.meta_path if "_editable" not in type(finder).__module__]
import torch
from engine import BackendError, Sampler, open_backend
from engine.__main__ import main
from engine.backends import registry
from engine.bundle.bundle_folder import Bundle
from engine.networks.inputs import Conditions

logging.basicConfig(level=logging.INFO, format="%(message)s")
bundle = Bundle.open(sys.argv[1])
backend, eager = open_backend(bundle, "reference"), open_backend(bundle, "eager", "fp32")
errors = []
for batch in (1, 2, 5):
    x_t = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(batch))
    inputs = x_t, torch.linspace(0, 99, batch), Conditions(torch.arange(batch) % 3)
    got, wanted = backend(*inputs), eager(*inputs)
    assert got.shape == wanted.shape and got.dtype == torch.float32
    errors.append(float((got - wanted).abs().max()))
images = [Sampler(each, bundle).sample(3, steps=4, seed=7) for each in (backend, eager)]
reasons = []
for precision in ("int8", None):
    try:
        open_backend(Bundle.open(sys.argv[2]) if precision is None else bundle, "reference", precision)
    except BackendError as error:
        reasons.append(str(error))
backend.close()
try:
    backend(*inputs)
except BackendError as error:
    reasons.append(str(error))
status = main(["sample", sys.argv[1], "-n", "2", "--steps", "2", "--backend", "reference", "--out", sys.argv[3]])
print(json.dumps({
    "names": registry.NAMES, "variants": registry.variants(), "errors": errors, "reasons": reasons, "status": status,
    "images": float((images[0] - images[1]).abs().max()),
}))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources after the page's section 3."""
    root = tmp_path_factory.mktemp("copy")
    for package in ("engine", "kernels"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__", "src", "*.so"))
    example, place = re.search(r"`(examples/\S+)`", PAGE), re.search(r"Save the file as `(\S+)`", PAGE)
    assert example is not None
    assert place is not None
    (root / place[1]).parent.mkdir()
    shutil.copy(ROOT / example[1], root / place[1])
    registry = root / "engine" / "backends" / "registry.py"
    text = registry.read_text(encoding="utf-8")
    changes = re.findall(r"^```diff\n-(.*)\n\+(.*)\n```$", PAGE, re.MULTILINE)
    assert len(changes) == 2
    for before, after in changes:
        assert text.splitlines().count(before) == 1, f"the page changes a line that is not there: {before}"
        text = text.replace(before, after)
    registry.write_text(text, encoding="utf-8")
    return root


def test_it_runs_by_its_name(copy: Path, tmp_path: Path) -> None:
    config = adm_unet(mult=(1,), attention=(), num_classes=3)
    bundle = write_bundle(tmp_path / "net.engine", config)
    plain = shutil.copytree(bundle, tmp_path / "plain.engine")
    export_onnx(random_network(config), bundle / onnx_name(UNET))
    Bundle.write(bundle, tiny_manifest(config))
    outcome = subprocess.run(
        [sys.executable, "-c", USE, str(bundle), str(plain), str(tmp_path / "out")],
        capture_output=True, text=True, timeout=600, cwd=tmp_path, check=False,
        env=os.environ | {"PYTHONPATH": str(copy)},
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    told = json.loads(outcome.stdout.splitlines()[-1])
    assert told["names"] == ["native", "ov", "ort", "eager", "reference", "trt"]
    assert ["reference", "fp32"] in told["variants"]
    assert max(told["errors"]) < FP32_OTHER_ORDER
    assert told["images"] < FP32_OTHER_ORDER
    offers, holds, closed = told["reasons"]
    assert "reference: it offers fp32, not int8" in offers
    assert "reference: the bundle holds no unet.onnx" in holds
    assert "this backend was closed" in closed
    assert "backend reference in fp32" in outcome.stderr
    assert told["status"] == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_it_keeps_the_arrows(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_imports, "ROOT", copy)
    graph = test_imports.module_graph()
    assert "engine.backends.reference" in graph["engine.backends.registry"]
    assert not test_imports.circle_of(graph)
