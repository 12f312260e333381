"""Our package `kernels` beside PyPI's of the same name, and beside diffusers, which looks for that one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code with `folder`, then the checkout, in front of everything installed."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


# The finder of an editable install puts our packages first whatever the path says; an ordinary one has none.
WITHOUT_EDITABLE_FINDER = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
"""


def test_foreign_kernels_package_is_named(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(name): ...\n")
    result = run_python(WITHOUT_EDITABLE_FINDER + "import engine", tmp_path)
    assert result.returncode == 1, "engine took a foreign `kernels` for ours"
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: ")
    assert str(tmp_path / "kernels" / "__init__.py") in message
    assert "PyPI's package `kernels` (Hugging Face) and unet-rt" in message
    assert "pip uninstall kernels" in message


def test_own_kernels_pass(tmp_path):
    result = run_python("import engine, kernels; print(kernels.__distribution__)", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "unet-rt"


def test_diffusers_loads_a_unet_beside_ours(tmp_path):
    code = """
import sys
sys.modules["torchvision"] = None  # must not be needed
import engine, kernels
import torch
from diffusers import UNet2DModel
from diffusers.utils import is_kernels_available

assert not is_kernels_available(), "diffusers takes our package for PyPI's"
torch.manual_seed(0)
shape = dict(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
             norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
             up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8)
made = UNet2DModel.from_config(shape).eval()
made.save_pretrained("unet")
loaded = UNet2DModel.from_pretrained("unet").eval()
x = torch.randn(2, 1, 8, 8)
with torch.no_grad():
    assert torch.equal(made(x, 3).sample, loaded(x, 3).sample)
print(kernels.__distribution__)
"""
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().splitlines()[-1] == "unet-rt"
