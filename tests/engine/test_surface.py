"""The public names of engine: exactly these, each with a docstring that says something."""

from __future__ import annotations

import importlib.metadata
import inspect

import pytest

import engine

PUBLIC = {
    "BackendError",
    "BundleError",
    "Checkpoint",
    "CheckpointError",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "ConfigError",
    "ExportError",
    "MissingPackageError",
    "NoiseSchedule",
    "OutputError",
    "RecordedNoise",
    "RequestError",
    "Sampler",
    "SamplingOptions",
    "UNetConfig",
    "UNetRTError",
    "UnknownFamilyError",
    "Variance",
    "__version__",
    "ddim_table",
    "ddpm_table",
    "dpmpp_table",
    "load_checkpoint",
    "open_backend",
    "plms_table",
}


def test_all_is_exact():
    assert set(engine.__all__) == PUBLIC
    assert sorted(engine.__all__) == engine.__all__


def test_the_version_is_that_of_the_installed_package():
    assert engine.__version__ == importlib.metadata.version("unet-rt")


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_public_names_are_documented(name):
    value = getattr(engine, name)
    # dataclass writes a docstring of its own where there is none: the name and the fields.
    assert value.__doc__
    assert not value.__doc__.startswith(f"{name}(")
    if inspect.isclass(value):
        methods = {k: v for k, v in vars(value).items() if not k.startswith("_") and inspect.isroutine(v)}
        plain = [k for k, v in methods.items() if not inspect.getdoc(v)]
        assert not plain
    else:
        assert inspect.signature(value).return_annotation not in (inspect.Signature.empty, None)


def test_every_error_is_one_of_ours():
    errors = {name for name in PUBLIC if name.endswith("Error")}
    assert len(errors) == 10
    assert all(issubclass(getattr(engine, name), engine.UNetRTError) for name in errors)
    assert issubclass(engine.UnknownFamilyError, engine.CheckpointError)
    assert issubclass(engine.MissingPackageError, engine.BackendError)


def test_a_missing_package_is_named_with_its_pip_line():
    error = engine.MissingPackageError("openvino", "the ov backend", "cpu")
    assert str(error) == "the ov backend needs the package openvino; install it with: pip install 'unet-rt[cpu]'"
