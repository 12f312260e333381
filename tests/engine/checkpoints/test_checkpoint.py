"""Reading checkpoint files: every format of torch.save, names of wrappers, and files that are broken or hostile."""

from __future__ import annotations

import builtins
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adm_classifier, adm_unet, call_main, openai_state, random_network
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoints.load import load_checkpoint
from engine.checkpoints.reading import read_file
from engine.checkpoints.unwrapping import without_wrappers
from engine.errors import CheckpointError, UnknownFamilyError
from engine.files import file_sha256
from engine.json_form import encode

CONFIG = adm_unet(mult=(1,), attention=())
FACTS: dict[str, Any] = {"image_size": 8, "num_heads": 1}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return openai_state(CONFIG)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return dict(random_network(CONFIG).state_dict())


def save_zip(content: Any, path: Path) -> None:
    torch.save(content, path)


def save_legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_raw(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def assert_reads(path: Path, weights: dict[str, Tensor], atol: float = 0.0) -> None:
    checkpoint = load_checkpoint(path, **FACTS)
    assert checkpoint.config == CONFIG
    assert checkpoint.weights.keys() == weights.keys()
    for name, value in weights.items():
        assert checkpoint.weights[name].dtype == torch.float32
        torch.testing.assert_close(checkpoint.weights[name], value, atol=atol, rtol=atol, msg=name)
    assert checkpoint.sha256 == file_sha256(path)


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_file], ids=["zip", "before torch 1.6", "safetensors"])
def test_formats(tmp_path, state, weights, save):
    save(state, tmp_path / "ema.pt")
    # One head of 32 channels: the scale 32**-0.5 in q is the only thing that is not exact.
    assert_reads(tmp_path / "ema.pt", weights, atol=1e-7)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.float64, 1e-7)])
@pytest.mark.parametrize("save", [save_zip, save_file], ids=["zip", "safetensors"])
def test_other_dtypes_become_float32(tmp_path, state, weights, save, dtype, atol):
    save({key: value.to(dtype) for key, value in state.items()}, tmp_path / "ema.pt")
    assert_reads(tmp_path / "ema.pt", weights, atol)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_names_that_wrappers_add(tmp_path, state, weights, prefix):
    torch.save({prefix + key: value for key, value in state.items()} | {"step": 3}, tmp_path / "ema.pt")
    assert_reads(tmp_path / "ema.pt", weights, atol=1e-7)


def test_names_of_wrappers_inside_a_nested_dictionary(tmp_path):
    one = torch.ones(1)
    nested = {"net": {"module.a.module.b": one, "module._orig_mod.c": one}, "module.x": 1, "opt": {0: one}}
    assert without_wrappers(nested) == {"net": {"a.module.b": one, "c": one}, "module.x": 1, "opt": {0: one}}
    assert without_wrappers({"module.a": one, "b": one}) == {"module.a": one, "b": one}
    assert without_wrappers([1]) == [1]


def test_whole_parameters_and_plain_values_beside_them(tmp_path, state, weights):
    content = {key: torch.nn.Parameter(value) for key, value in state.items()}
    torch.save(content | {"step": 7, "betas": [0.1], "note": {"a": (1, None, True)}, 5: "five"}, tmp_path / "ema.pt")
    assert_reads(tmp_path / "ema.pt", weights, atol=1e-7)
    assert not any(value.requires_grad for value in load_checkpoint(tmp_path / "ema.pt", **FACTS).weights.values())


@pytest.mark.parametrize("save", [save_zip, save_legacy], ids=["zip", "before torch 1.6"])
def test_classes_that_are_not_here_become_placeholders(tmp_path, state, weights, save):
    """As Lightning's files: an instance of the training program's own class beside the weights."""
    module = types.ModuleType("gone_training_code")
    source = "class Settings(dict):\n    def __init__(self): self.rate = 1\n    def __reduce_ex__(self, p): "
    exec(source + "return Settings, (), {'rate': 2}, iter([]), iter([('a', 1)])", module.__dict__)
    sys.modules[module.__name__] = module
    module.Settings.__module__ = module.__name__
    try:
        extra = {"hyper_parameters": module.Settings(), "classes": [module.Settings], "callbacks": {module.Settings: 1}}
        save(state | extra, tmp_path / "flat.pt")
        save({"state_dict": state} | extra, tmp_path / "nested.pt")
    finally:
        del sys.modules[module.__name__]
    assert_reads(tmp_path / "flat.pt", weights, atol=1e-7)
    content = read_file(tmp_path / "nested.pt")
    assert list(content) == ["state_dict", "hyper_parameters", "classes", "callbacks"]
    assert all(torch.equal(content["state_dict"][key], value) for key, value in state.items())
    assert "gone_training_code" not in sys.modules
    with pytest.raises(
        UnknownFamilyError, match=r"no checkpoint of a known family.\nfound: 4 keys: state_dict, hyper_p"
    ):
        load_checkpoint(tmp_path / "nested.pt")


class Payload:
    """Pickles as a call of `function`, which unpickling would make."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def payloads(marker: Path) -> dict[str, Payload]:
    """By the name that the message must show: protocol 2 writes some as Python 2 called them."""
    make = f"open({str(marker)!r}, 'w').close()"
    return {
        "(posix|os).system": Payload(os.system, f"touch '{marker}'"),
        "(builtins|__builtin__).eval": Payload(eval, make),
        "(builtins|__builtin__).exec": Payload(exec, make),
        "(subprocess|commands).Popen": Payload(subprocess.Popen, ["touch", str(marker)]),
        "(io|_io|builtins|__builtin__).open": Payload(builtins.open, str(marker), "w"),
        "importlib.util.find_spec": Payload(importlib.util.find_spec, "os"),
    }


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_raw], ids=["zip", "before torch 1.6", "pickle"])
@pytest.mark.parametrize("name", payloads(Path()))
def test_code_in_a_file_is_not_run(tmp_path, state, save, name):
    marker, path = tmp_path / "marker", tmp_path / "ema.pt"
    save({"extra": payloads(marker)[name]} | state, path)
    with pytest.raises(CheckpointError, match=rf"the file would run code when loaded: it names {name}\.") as caught:
        load_checkpoint(path, **FACTS)
    assert "Nothing was run" in str(caught.value)
    assert "get the checkpoint from a source you trust" in str(caught.value)
    assert "would run code" in call_main("info", path, "--image-size", "8").error
    assert not marker.exists()


def test_the_payload_is_live(tmp_path):
    """What the test above refuses does run under a plain pickle.loads."""
    pickle.loads(pickle.dumps(payloads(tmp_path / "marker")["(builtins|__builtin__).exec"]))
    assert (tmp_path / "marker").exists()


def test_a_function_that_nobody_listed_is_not_run_either(tmp_path, state, weights):
    folder = tmp_path / "made"
    folder.mkdir()
    torch.save(state | {"extra": Payload(tempfile.mkdtemp, None, None, str(folder))}, tmp_path / "ema.pt")
    assert_reads(tmp_path / "ema.pt", weights, atol=1e-7)
    assert not list(folder.iterdir())


def test_a_whole_pickled_module_is_no_state_dict(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(UnknownFamilyError, match="found: an object of type Linear, not a dictionary"):
        load_checkpoint(tmp_path / "model.pt")


def cut(path: Path, part: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])


TRUNCATED = "it is truncated or not a file that torch.save wrote. Copy it again and compare its size with the original"
BROKEN = {
    "truncated zip": TRUNCATED,
    "truncated legacy": TRUNCATED,
    "legacy header": TRUNCATED,
    "broken pickle": TRUNCATED,
    "text": TRUNCATED,
    "safetensors header": TRUNCATED,
    "truncated safetensors": "is damaged (.*); copy the checkpoint again",
    "other zip": "is a zip file but no checkpoint: it has no data.pkl and holds readme.txt; unpack it and pass the ch",
    "empty zip": "is a zip file but no checkpoint: it has no data.pkl and holds nothing",
    "empty": r"is empty \(0 bytes\); copy the checkpoint again",
    "missing": "does not exist; pass the path of a checkpoint file",
    "folder": r"is a folder without config.json or unet/config.json \(found: nothing\); pass a checkpoint file, or a",
    "TorchScript": r"is a TorchScript archive; pass the training checkpoint \(its state dict\) instead",
    "list": "found: an object of type list, not a dictionary",
    "no keys": "found: an empty dictionary",
    "other keys": r"found: 9 keys: a0, a1, a2, a3, a4, a5, a6, a7, ...\nneeded:\n(.*\n)*  openai-guided/openai-impr",
}


def write_broken(name: str, path: Path, state: dict[str, Tensor]) -> None:
    match name:
        case "truncated zip":
            save_zip(state, path)
            cut(path, 0.7)
        case "truncated legacy" | "legacy header":
            save_legacy(state, path)
            cut(path, 0.8 if name == "truncated legacy" else 0.01)
        case "truncated safetensors" | "safetensors header":
            save_file(state, path)
            cut(path, 0.8 if name == "truncated safetensors" else 0.001)
        case "broken pickle":
            write_members(path, {"net/data.pkl": b"\x80\x02}q\x00\xff\xff.", "net/version": b"3\n"})
        case "other zip":
            write_members(path, {"readme.txt": b"text"})
        case "empty zip":
            write_members(path, {})
        case "TorchScript":
            write_members(path, {"net/data.pkl": b"\x80\x02}q\x00.", "net/constants.pkl": b"\x80\x02}q\x00."})
        case "folder":
            path.mkdir()
        case "missing":
            pass
        case _:
            path.write_bytes(b"Not Found\n" if name == "text" else b"")
    contents = {"list": [1], "no keys": {}, "other keys": {f"a{i}": torch.ones(1) for i in range(9)}}
    if name in contents:
        torch.save(contents[name], path)


def write_members(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(tmp_path, state, name):
    path = tmp_path / "ema.pt"
    write_broken(name, path, state)
    before = sorted(os.walk(tmp_path))
    with pytest.raises(CheckpointError, match=BROKEN[name]):
        load_checkpoint(path)
    outcome = call_main("info", path)
    assert str(path) in outcome.error
    assert outcome.out == ""
    assert sorted(os.walk(tmp_path)) == before


def test_a_real_torchscript_archive(tmp_path):
    with pytest.warns((DeprecationWarning, FutureWarning), match="torch.jit"):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="is a TorchScript archive"):
        load_checkpoint(tmp_path / "net.pt")


def test_every_byte_counts(tmp_path, state):
    """Whatever is cut off, the error is a CheckpointError; nothing but the whole file is a checkpoint."""
    for save in (save_zip, save_legacy):
        save({key: value for key, value in state.items() if key.startswith("time_embed.0.b")}, tmp_path / "a.pt")
        whole = (tmp_path / "a.pt").read_bytes()
        for length in (*range(1, 60), *range(60, len(whole), 61)):
            (tmp_path / "b.pt").write_bytes(whole[:length])
            with pytest.raises(CheckpointError):
                load_checkpoint(tmp_path / "b.pt")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "ema.pt"
    path.write_bytes(b"x" * 100)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        load_checkpoint(path)


def test_facts_on_the_command_line(tmp_path, state):
    path = tmp_path / "ema.pt"
    torch.save(state, path)
    for flags, message in (
        (["--image-size", "8", "--num-heads", "5"], "32 channels cannot have 5 heads"),
        (["--image-size", "8", "--num-heads", "0"], "num_heads is 0; expected a whole number from 1 up"),
        (["--image-size", "8", "--num-train-timesteps", "0"], "num_train_timesteps is 0; expected a whole number"),
        (["--image-size", "8", "--num-train-timesteps", "10"], "every beta must lie in (0, 1)"),
        (["--image-size", "8", "--null-class", "0"], None),
        ([], "the image size is not in the file; give it with --image-size HxW"),
        (["--image-size", "8", "--family", "adm"], "unknown family 'adm'; known: "),
        (["--image-size", "8", "--verify"], "--verify checks a bundle's files"),
    ):
        outcome = call_main("info", path, *flags)
        if message is None:
            assert outcome.status == 0, outcome
        else:
            assert message in outcome.error
    for flags, message in (
        (["--image-size", "eight"], "argument --image-size: invalid parse_image_size value: 'eight'"),
        (["--num-heads", "four"], "argument --num-heads: invalid int value: 'four'"),
        (["--noise-schedule", "x"], "argument --noise-schedule: invalid choice: 'x'"),
        (["--heads", "4"], "unrecognized arguments: --heads 4"),
    ):
        assert message in call_main("info", path, *flags).error


def test_info_about_a_checkpoint(tmp_path, state):
    torch.save(state, tmp_path / "ema.pt")
    outcome = call_main("info", tmp_path / "ema.pt", "--image-size", "8x12", "--num-heads", "1")
    assert outcome.status == 0
    for text in ("openai-guided U-Net", "image        1 x 8 x 12", "parameters", "1000 steps", "predicts     eps"):
        assert text in outcome.out
    assert "noise_schedule = linear: the default of OpenAI's training scripts (--noise-schedule)" in outcome.out
    assert outcome.err == ""


def test_info_as_json(tmp_path):
    config = adm_classifier()
    torch.save(openai_state(config), tmp_path / "c.pt")
    outcome = call_main("info", tmp_path / "c.pt", "--num-head-channels", "32", "--json")
    data = json.loads(outcome.out)
    assert (data["kind"], data["family"]) == ("classifier", "openai-guided")
    assert data["config"] == json.loads(json.dumps(encode(config)))
    assert data["sha256"] == file_sha256(tmp_path / "c.pt")
    assert data["parameters"] == sum(value.numel() for value in random_network(config).parameters())
    assert ["image_size", [8, 8], "16 positions in the attention pool"] in data["assumptions"]


def test_a_checkpoint_in_place_of_a_bundle(tmp_path, state):
    torch.save(state, tmp_path / "ema.pt")
    out = tmp_path / "out"
    message = call_main("sample", tmp_path / "ema.pt", "--out", out).error
    assert "is not a folder; pass a bundle, or make one with: python -m export.to_trt CHECKPOINT" in message
    assert not out.exists()
    assert "is not a folder" in call_main("sample", tmp_path / "nothing", "--out", out).error
