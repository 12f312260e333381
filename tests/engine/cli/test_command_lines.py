"""python -m engine sample and info, on a tiny bundle that the eager backend runs."""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Outcome, adm_classifier, adm_unet, call_main, logging_restored, write_bundle, write_checkpoint
from PIL import Image

from engine import images
from engine.bundle.file_names import UNET, weights_name
from engine.cli import sample as cli_sample
from engine.cli.command import run_command
from engine.errors import OutputError
from engine.networks.unet import UNet
from engine.sampling.sampler import Sampler

pytestmark = pytest.mark.usefixtures("no_native_engine")

CONFIG = adm_unet(mult=(1,), attention=(), num_classes=5, null_class=2)
CLASSES = [0, 1, 3, 4]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("cli") / "tiny.engine", CONFIG)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    config = adm_classifier(mult=(1,), attention=(), num_classes=5)
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "classifier.pt", config)


def expected(bundle: Path, n: int, **options) -> np.ndarray:
    return images.to_uint8(Sampler.open(bundle, "eager").sample(n, steps=3, **options))


def sample(bundle: Path, *options: object) -> Outcome:
    return call_main("sample", bundle, "--steps", 3, *options)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "samples.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_png_files_and_their_table(tmp_path, bundle):
    out = tmp_path / "new" / "samples"
    outcome = sample(bundle, "-n", 3, "--seed", 7, "--out", out, "--batch-size", 2)
    assert outcome.status == 0, outcome
    assert names(out) == ["000000.png", "000001.png", "000002.png", "samples.csv"]
    for i, image in enumerate(expected(bundle, 3, seed=7)):
        with Image.open(out / f"{i:06d}.png") as picture:
            # One seed is one image; a batch of another size may round a byte differently.
            assert np.abs(np.asarray(picture).astype(int) - image[..., 0]).max() <= 1
    table = rows(out)
    assert [(row["index"], row["seed"]) for row in table] == [("0", "7"), ("1", "8"), ("2", "9")]
    assert {int(row["label"]) for row in table} <= set(CLASSES)
    assert "3 images in" in outcome.out
    assert "(ddim, 3 steps)" in outcome.out
    assert "backend eager fp32" in outcome.out
    assert f"written: {out}" in outcome.out


def test_piped_output_has_no_progress_bar(tmp_path, bundle):
    outcome = sample(bundle, "-n", 1, "--grid", tmp_path / "g.png")
    assert "sampling" not in outcome.err
    assert "it/s" not in outcome.err
    assert "\r" not in outcome.err
    assert outcome.err.startswith("backend eager in fp32 (native: UNETRT_NATIVE_LIBRARY names")
    assert "ov: the bundle holds no unet.onnx" in outcome.err


def test_npz(tmp_path, bundle):
    assert sample(bundle, "-n", 4, "--format", "npz", "--out", tmp_path, "--class", 3).status == 0
    assert names(tmp_path) == ["samples.csv", "samples.npz"]
    with np.load(tmp_path / "samples.npz") as stored:
        assert stored["arr_0"].shape == (4, 8, 8, 1)
        assert stored["arr_0"].dtype == np.uint8
        assert stored["arr_1"].tolist() == [3, 3, 3, 3]
        assert np.abs(stored["arr_0"].astype(int) - expected(bundle, 4, labels=3)).max() <= 1
    assert [row["label"] for row in rows(tmp_path)] == ["3"] * 4


def test_per_class_grid_has_one_row_a_class(tmp_path, bundle):
    outcome = sample(bundle, "-n", 8, "--per-class", "--grid", tmp_path / "g.png", "--out", tmp_path / "o")
    assert outcome.status == 0, outcome
    assert [int(row["label"]) for row in rows(tmp_path / "o")] == [y for y in CLASSES for _ in range(2)]
    with Image.open(tmp_path / "g.png") as picture:
        whole = np.asarray(picture)
    assert whole.shape == (4 * 8, 2 * 8)
    for i in range(8):
        with Image.open(tmp_path / "o" / f"{i:06d}.png") as picture:
            part = whole[i // 2 * 8 : i // 2 * 8 + 8, i % 2 * 8 : i % 2 * 8 + 8]
            assert np.array_equal(np.asarray(picture), part)


def test_grid_columns_and_enlargement(tmp_path, bundle):
    assert sample(bundle, "-n", 5, "--grid", tmp_path / "new" / "g.png").status == 0
    with Image.open(tmp_path / "new" / "g.png") as picture:
        assert picture.size == (24, 16)
    assert sample(bundle, "-n", 5, "--grid", tmp_path / "h.png", "--columns", 5, "--enlarge", 2).status == 0
    with Image.open(tmp_path / "h.png") as picture:
        assert picture.size == (80, 16)


def test_json_summary(tmp_path, bundle):
    grid = tmp_path / "g.png"
    outcome = sample(bundle, "-n", 3, "--sampler", "ddpm", "--grid", grid, "--json", "--batch-size", 2, "--threads", 1)
    data = json.loads(outcome.out)
    assert data.pop("seconds") > 0
    assert data.pop("ms_per_step") > 0
    assert data.pop("images_per_second") > 0
    assert data == {
        "images": 3,
        "steps": 3,
        "sampler": "ddpm",
        "backend": "eager",
        "precision": "fp32",
        "batch_size": 2,
        "out": None,
        "grid": str(grid),
    }


def test_classifier_guidance(tmp_path, bundle, classifier):
    plain, guided, off = (tmp_path / name for name in ("plain", "guided", "off"))
    facts = ("--classifier", classifier, "--classifier-fact", "num_head_channels=32", "--class", 3, "-n", 2)
    assert sample(bundle, "-n", 2, "--class", 3, "--out", plain).status == 0
    outcome = sample(bundle, *facts, "--classifier-scale", 40, "--out", guided)
    assert "classifier: assumed noise_schedule = linear" in outcome.err
    assert sample(bundle, *facts, "--classifier-scale", 0, "--out", off).status == 0
    for i in range(2):
        content = [(folder / f"{i:06d}.png").read_bytes() for folder in (plain, guided, off)]
        assert content[0] == content[2] != content[1]


def test_per_class_of_an_unlabelled_network_with_a_classifier(tmp_path, classifier):
    unlabelled = write_bundle(tmp_path / "u.engine", adm_unet(mult=(1,), attention=()))
    facts = ("--classifier", classifier, "--classifier-fact", "num_head_channels=32")
    grid = tmp_path / "g.png"
    outcome = sample(unlabelled, "-n", 10, "--per-class", *facts, "--grid", grid, "--out", tmp_path / "o")
    assert outcome.status == 0, outcome
    assert [int(row["label"]) for row in rows(tmp_path / "o")] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    with Image.open(grid) as picture:
        assert picture.size == (2 * 8, 5 * 8)


REFUSALS = {
    "nothing would be kept; give --out DIR, --grid FILE or both": ["-n", "2"],
    "label 5 does not exist; this checkpoint has labels 0 to 4": ["--class", "5", "--out", "OUT"],
    "label -1 does not exist": ["--class", "-1", "--out", "OUT"],
    "cannot read 'many' as steps": ["--steps", "many", "--out", "OUT"],
    "cannot take 101 steps": ["--steps", "101", "--out", "OUT"],
    "cannot take 0 steps": ["--steps", "0", "--grid", "OUT/g.png"],
    "n is 0; expected 1 or more images": ["-n", "0", "--out", "OUT"],
    "seed is -1": ["--seed", "-1", "--out", "OUT"],
    "batch_size is 0; expected 1 or more": ["--batch-size", "0", "--grid", "g/OUT"],
    "eta must lie between 0 and 1, got 7": ["--eta", "7", "--out", "OUT"],
    "eta belongs to ddim": ["--sampler", "ddpm", "--eta", "0.5", "--out", "OUT"],
    "dpmpp adds no noise": ["--sampler", "dpmpp", "--eta", "0.5", "--out", "OUT"],
    "variance belongs to ddpm": ["--variance", "fixed_small", "--out", "OUT"],
    "no variance channels": ["--sampler", "ddpm", "--variance", "learned_range", "--out", "OUT"],
    "unknown backend 'fast'; known: auto": ["--backend", "fast", "--out", "OUT"],
    "no backend can run this bundle here: eager: it offers fp32, not int8": [
        *("--backend", "eager", "--precision", "int8", "--out", "OUT")
    ],
    "the bundle holds no unet.onnx": ["--backend", "ort", "--out", "OUT"],
    "threads is 0; expected 1 or more": ["--threads", "0", "--out", "OUT"],
    "--per-class needs a multiple of the 4 classes, got -n 6": ["-n", "6", "--per-class", "--out", "OUT"],
    "--columns is 0; expected 1 or more": ["--columns", "0", "--grid", "OUT/g.png"],
    "--enlarge is 0; expected 1 or more": ["--enlarge", "0", "--grid", "OUT/g.png"],
    "does not exist; pass the path of a checkpoint file": ["--classifier", "nothing.pt", "--out", "OUT"],
    "invalid choice: 'euler'": ["--sampler", "euler", "--out", "OUT"],
    "invalid int value: 'seven'": ["--class", "seven", "--out", "OUT"],
    "argument --per-class: not allowed with argument --class": ["--class", "1", "--per-class", "--out", "OUT"],
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the messages list what a machine without CUDA offers")
@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(tmp_path, monkeypatch, bundle, message):
    """One message, exit status 2, nothing written; a folder may have been made."""
    monkeypatch.chdir(tmp_path)
    outcome = call_main("sample", bundle, *REFUSALS[message])
    assert message in outcome.error
    assert outcome.out == ""
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_refusals_about_the_classifier(tmp_path, bundle, classifier):
    for options, message in (
        (["--classifier-fact", "num_head_channels"], "--classifier-fact takes NAME=VALUE, got 'num_head_channels'"),
        (["--classifier-fact", "heads=3"], "unknown checkpoint fact heads; known: family"),
        (["--classifier-fact", "num_heads=three"], "num_heads is 'three'; expected a whole number"),
        (["--classifier-fact", "rescale_timesteps=false"], "rescale_timesteps is 'false'; expected True or False"),
        (["--classifier-fact", "image_size=16x16"], "(none fits what was given); give the training's --num-res-blocks"),
        (["--classifier-scale", "nan", "--classifier-fact", "num_heads=1"], "the guidance scale is nan"),
    ):
        assert message in sample(bundle, "--classifier", classifier, *options, "--out", tmp_path / "o").error
    unet = write_checkpoint(tmp_path / "unet.pt", CONFIG)
    outcome = sample(bundle, "--classifier", unet, "--classifier-fact", "num_heads=1", "--out", tmp_path / "o")
    assert "this checkpoint is a U-Net; a noise-conditioned classifier is needed here" in outcome.error
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "options", [["--out", "FILE/below"], ["--grid", "FILE/g.png"], ["--grid", "FOLDER", "-n", "1"]]
)
def test_places_that_cannot_be_written(tmp_path, monkeypatch, bundle, options):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("kept")
    Path("FOLDER").mkdir()
    error = sample(bundle, *options).error
    assert error.startswith(f"cannot write {options[1].removesuffix('/g.png')}")
    assert "choose another path" in error or "choose the name of a file" in error
    assert Path("FILE").read_text() == "kept"
    assert names(tmp_path) == ["FILE", "FOLDER"]
    assert not names(Path("FOLDER"))


def test_full_disk(tmp_path, monkeypatch, bundle):
    """The images written before the disk was full stay, whole; the table lists these and no other."""
    real, calls = images.save_png, []

    def save_png(path: Path, image: np.ndarray) -> None:
        calls.append(path)
        if len(calls) > 2:
            raise OutputError(f"cannot write {path}: {os.strerror(errno.ENOSPC)}; free space on this disk, or")
        real(path, image)

    monkeypatch.setattr(images, "save_png", save_png)
    outcome = sample(bundle, "-n", 4, "--out", tmp_path / "o", "--batch-size", 1)
    assert "000002.png: No space left on device; free space" in outcome.error
    assert names(tmp_path / "o") == ["000000.png", "000001.png", "samples.csv"]
    assert [row["index"] for row in rows(tmp_path / "o")] == ["0", "1"]


@pytest.mark.parametrize("form", ["png", "npz"])
@pytest.mark.parametrize("moment", ["in a step", "while saving"])
def test_ctrl_c_leaves_finished_images(tmp_path, monkeypatch, bundle, form, moment):
    calls = []
    if moment == "in a step":
        real = Sampler.run

        def run(self, *args, **kwargs):
            for step in real(self, *args, **kwargs):
                yield step
                calls.append(step)
                if len(calls) == 7:
                    raise KeyboardInterrupt

        monkeypatch.setattr(Sampler, "run", run)
    else:
        convert = cli_sample.to_uint8

        def to_uint8(image):
            calls.append(image)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return convert(image)

        monkeypatch.setattr(cli_sample, "to_uint8", to_uint8)
    outcome = sample(
        bundle, "-n", 4, "--out", tmp_path / "o", "--grid", tmp_path / "g.png", "--batch-size", 1, "--format", form
    )
    assert outcome.status == 130
    assert outcome.err.endswith("interrupted\n")
    assert "Traceback" not in outcome.err
    kept = ["000000.png", "000001.png", "samples.csv"] if form == "png" else ["samples.csv", "samples.npz"]
    assert names(tmp_path / "o") == kept
    assert [row["index"] for row in rows(tmp_path / "o")] == ["0", "1"]
    assert not (tmp_path / "g.png").exists()


def test_ctrl_c_before_the_first_image(tmp_path, monkeypatch, bundle):
    def run(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Sampler, "run", run)
    assert sample(bundle, "--out", tmp_path / "o").status == 130
    assert names(tmp_path / "o") == []


def test_images_of_a_network_that_overflows(tmp_path, monkeypatch, bundle):
    """NaN from a network is an error and no black square."""
    broken = tmp_path / "b.engine"
    shutil.copytree(bundle, broken)

    def forward(_self: UNet, x_t: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return torch.full_like(x_t, torch.nan)

    monkeypatch.setattr(UNet, "forward", forward)
    outcome = sample(broken, "-n", 1, "--out", tmp_path / "o")
    assert "hold NaN" in outcome.error
    assert names(tmp_path / "o") == []


def test_one_byte_changed_in_the_bundle(tmp_path, bundle):
    changed = tmp_path / "c.engine"
    shutil.copytree(bundle, changed)
    content = bytearray((changed / weights_name(UNET)).read_bytes())
    content[-1] ^= 1
    (changed / weights_name(UNET)).write_bytes(content)
    message = "was changed after it was built (its sha256 differs from the manifest's); build it again with"
    assert message in sample(changed, "--out", tmp_path / "o").error
    assert message in call_main("info", changed, "--verify").error
    assert call_main("info", changed).status == 0
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("first", "place"), [(False, "behind"), (True, "in front of")])
def test_info_says_where_a_condition_image_stands(tmp_path, first, place):
    config = dataclasses.replace(adm_unet(channels=3, super_resolution=True), cond_first=first)
    outcome = call_main("info", write_bundle(tmp_path / "b.engine", config))
    assert f"condition    3 channels, concatenated {place} x_t" in outcome.out


def test_info_about_a_bundle(bundle):
    outcome = call_main("info", bundle, "--verify")
    assert outcome.status == 0
    assert outcome.err == ""
    for text in (
        "bundle of openai-guided",
        "image        1 x 8 x 8",
        "classes      5, of which 2 means none",
        "schedule     100 steps, beta",
        "variance fixed_large, x0 limited to +-1",
        "files (all hashes are right)",
        f"  {weights_name(UNET)}  ",
    ):
        assert text in outcome.out
    data = json.loads(call_main("info", bundle, "--json").out)
    assert data["verified"] is False
    assert data["networks"]["unet"]["config"]["null_class"] == 2
    assert list(data["files"]) == [weights_name(UNET)]


@pytest.mark.parametrize("command", [[], ["sample"], ["info"]])
def test_help(command):
    outcome = call_main(*command, "--help")
    assert outcome.status == 0
    assert outcome.err == ""
    assert "usage: python -m engine" in outcome.out
    examples = [line.split() for line in outcome.out.splitlines() if line.startswith("  python -m engine ")]
    assert bool(examples) == (not command)


def test_no_command():
    assert "the following arguments are required: command" in call_main().error


def test_a_reader_that_goes_away():
    """`python -m engine info ... | head -0` ends quietly, also when the rest of its buffer is written at exit."""
    read, write = os.pipe()
    os.close(read)
    with logging_restored(), os.fdopen(write, "w") as pipe, contextlib.redirect_stdout(pipe):
        assert run_command(lambda _: print("text"), argparse.Namespace()) == 0
        print("more")


def test_two_channels_go_into_no_png(tmp_path):
    """Said before the first step, with the format that holds them."""
    two = write_bundle(tmp_path / "two.engine", adm_unet(channels=2, mult=(1,), attention=()))
    for place in (("--out", tmp_path / "out"), ("--grid", tmp_path / "grid.png")):
        outcome = sample(two, "-n", 1, *place)
        assert outcome.status == 2
        assert "cannot hold an image of 2 channels; expected 1 or 3: save the images as .npz" in outcome.error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two.engine"]
    assert sample(two, "-n", 1, "--format", "npz", "--out", tmp_path / "out").status == 0


def test_classifier_free_guidance(tmp_path, bundle):
    def image(*extra: object) -> bytes:
        path = tmp_path / "g.png"
        assert sample(bundle, "-n", 1, "--class", 1, "--sampler", "dpmpp", "--grid", path, *extra).status == 0
        return path.read_bytes()

    plain = image()
    assert image("--guidance-scale", 1) == plain
    assert image("--guidance-scale", 40) != plain
    assert image("--guidance-scale", 40, "--guidance-interval", -2, -1) == plain
    rescaled = image("--guidance-scale", 40, "--guidance-rescale", 0.7)
    assert rescaled not in (plain, image("--guidance-scale", 40))
    ddim = ("--sampler", "ddim", "--guidance-scale", 0.5)
    assert image(*ddim, "--guidance-plus-plus") != image(*ddim)
