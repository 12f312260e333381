"""benchmarks.gpu_check: parts that fail, hang or crash leave the others alone; the JSON and the picture."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import adm_unet, write_bundle
from PIL import Image

from benchmarks import gpu_check, gpu_parts
from benchmarks.gpu_check import Part, check, compare, report
from judging.metrics import MOST_PSNR_DB

WRITES = "import json, sys, numpy; from pathlib import Path; work, result = map(Path, sys.argv[1:3])\n"


def python(name: str, code: str, work: Path, limit_s: float = 30.0) -> Part:
    return Part(name, (sys.executable, "-c", WRITES + code, str(work), "{result}"), limit_s)


def image_part(precision: str, value: str, work: Path) -> Part:
    name = f"images:{precision}"
    path = gpu_parts.images_file(work, name)
    code = f"numpy.save({str(path)!r}, numpy.full((3, 1, 4, 4), {value}, 'float32')); result.write_text('{{}}')"
    return python(name, code, work)


def test_parts_fail_alone(tmp_path):
    """An exception, a crash, a hang, a missing result and a part without time; what passed is kept."""
    work = tmp_path / "work"
    parts = [
        python("error", "raise SystemExit('no kernel image')", work),
        python("crash", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", work),
        python("hang", "print('started', flush=True); import time; time.sleep(60)", work, limit_s=2),
        python("silent", "", work),
        image_part(gpu_parts.REFERENCE, "0.5", work),
        image_part("trt:fp16", "0.5 + 2e-3", work),
        image_part("eager:fp16", "0.5", work),
        python("latency", "result.write_text(json.dumps({'rows': [{'case': {'variant': 'x', 'batch': 1}, 'metrics': "
               "dict.fromkeys(('p50_ms', 'p10_ms', 'p90_ms', 'network_ms'), 1.5)}]}))", work),
        python("late", "result.write_text('{}')", work, limit_s=0),
    ]  # fmt: skip
    start = time.monotonic()
    outcomes = check(tmp_path, parts)
    assert time.monotonic() - start < 40
    assert [o.status for o in outcomes] == ["failed", "failed", "timeout", "failed", *["passed"] * 4, "skipped"]
    data = json.loads((tmp_path / "gpu_check.json").read_text())
    by_name = {part["name"]: part for part in data["parts"]}
    assert by_name["error"]["log"] == ["no kernel image", "exit status 1"]
    assert by_name["crash"]["log"][-1] == "exit status -9"
    assert by_name["hang"]["log"][0] == "started"
    assert by_name["latency"]["result"]["rows"][0]["metrics"]["p50_ms"] == 1.5
    found = data["images"]["backends"]
    assert found["eager:fp16"] == {"max_abs": 0.0, "psnr_db": MOST_PSNR_DB}
    assert found["trt:fp16"]["max_abs"] == pytest.approx(2e-3, rel=1e-3)
    assert found["trt:fp16"]["psnr_db"] == pytest.approx(60.0, abs=0.01)
    with Image.open(tmp_path / "gpu_check.png") as picture:
        assert picture.size == (3 * 4 * 2, 3 * 4 * 2)
    text = report(outcomes, compare(work, outcomes))
    assert all(word in text for word in ("timeout", "60.0", "150.0", "1.500"))


def test_nothing_of_an_earlier_run_counts(tmp_path):
    """A result or images that lie there from before are not those of a part that fails now."""
    work = tmp_path / "work"
    assert check(tmp_path, [image_part(gpu_parts.REFERENCE, "0.5", work)])[0].status == "passed"
    (outcome,) = check(tmp_path, [python(f"images:{gpu_parts.REFERENCE}", "sys.exit(3)", work)])
    assert (outcome.status, outcome.result) == ("failed", None)
    assert compare(work, [outcome]) == {}


def test_the_whole_time_is_limited(tmp_path):
    sleeping = [python(f"part {i}", "import time; time.sleep(30)", tmp_path / "work") for i in range(3)]
    start = time.monotonic()
    outcomes = check(tmp_path, sleeping, budget_s=2)
    assert time.monotonic() - start < 10
    assert [o.status for o in outcomes] == ["timeout", "skipped", "skipped"]


def test_the_real_parts():
    names = [part.name for part in gpu_check.parts(Path("work"))]
    assert names[0] == "build"
    assert "latency" in names
    assert "tests" in names
    assert {name for name in names if name.startswith("images:")} >= {
        "images:trt:fp16",
        f"images:{gpu_parts.REFERENCE}",
    }
    assert gpu_check.BUDGET_S < 600


def test_without_a_gpu(tmp_path, capsys):
    """One line and exit status 2, nothing written; the parts say the same."""
    if torch.cuda.is_available():
        pytest.skip("is about a machine without a GPU")
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: gpu-check needs an NVIDIA GPU: ")
    assert error.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()
    assert gpu_parts.main(["build", "--work", str(tmp_path), "--result", str(tmp_path / "r.json")]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
    assert gpu_parts.main(["images:x:y", "--work", str(tmp_path), "--result", str(tmp_path / "r.json")]) == 2
    assert "unknown part" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_images_of_a_bundle(tmp_path, monkeypatch):
    """The part that samples, on a small bundle on the CPU."""
    write_bundle(gpu_parts.bundle_folder(tmp_path), adm_unet(num_classes=11, null_class=10))
    monkeypatch.setattr(gpu_parts, "_STEPS", 2)
    result = gpu_parts.images(tmp_path, "eager", "fp32")
    assert result == {"images": 10, "steps": 2, "precision": "fp32"}
    assert np.load(gpu_parts.images_file(tmp_path, "images:eager:fp32")).shape == (10, 1, 8, 8)
