"""What a figure was measured on: processor, clocks, threads, GPU and versions. Nothing in it names the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from engine.backends.native.native_backend import count_cores

PACKAGES = (
    "unet-rt",
    "torch",
    "numpy",
    "onnx",
    "onnxruntime",
    "openvino",
    "diffusers",
    "denoising-diffusion-pytorch",
    "triton",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "torch-fidelity",
)
_ISA = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm")
_GPU_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "memory.total")


def environment(threads: int | None = None) -> dict[str, Any]:
    """The environment block of a report. threads: those given to every variant, None for all cores."""
    return {
        "cpu": cpu(),
        "gpu": gpu(),
        "threads": threads or count_cores(),
        "load_average": _load(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name)) is not None},
    }


def cpu() -> dict[str, Any]:
    """Model, cores, instruction sets that matter here, and clocks in MHz where they can be read, else None."""
    text = _read(Path("/proc/cpuinfo"))
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    has = set(flags.group(1).split()) if flags else set()
    megahertz = [float(value) for value in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", text, re.MULTILINE)]
    frequency = Path("/sys/devices/system/cpu/cpu0/cpufreq")
    return {
        "model": model.group(1) if model else platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": count_cores(),
        "isa": [name for name in _ISA if name in has],
        "clock_mhz": max(megahertz) if megahertz else None,
        "governor": _read(frequency / "scaling_governor").strip() or None,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def gpu() -> dict[str, Any] | None:
    """What nvidia-smi says of the first GPU; None where there is none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {
        "name": properties.name,
        "capability": f"sm{properties.major}{properties.minor}",
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }
    command = shutil.which("nvidia-smi")
    if command is None:
        return found
    query = [command, f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader", "--id=0"]
    result = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    if result.returncode == 0:
        values = [value.strip() for value in result.stdout.strip().split(",")]
        found |= {name.replace(".", "_"): value for name, value in zip(_GPU_FIELDS, values, strict=False)}
    return found


def describe(block: dict[str, Any]) -> str:
    """One line for a reader."""
    processor = block["cpu"]
    parts = [f"{processor['model']}, {block['threads']} thread{'' if block['threads'] == 1 else 's'}"]
    if processor["isa"]:
        parts.append(" ".join(processor["isa"]))
    if block["gpu"]:
        parts.insert(0, block["gpu"]["name"])
    parts.append(f"torch {block['versions'].get('torch', 'unknown')}")
    return "; ".join(parts)


def _load() -> list[float] | None:
    """Over 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
