"""Generation in shards: what a shard holds, and that no kill, damage or full disk changes or loses an image."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_runs import ForkedRuns
from helpers import Outcome, adm_classifier, adm_unet, call_main, random_network, write_bundle, write_checkpoint

from engine import images
from engine.bulk import job as bulk
from engine.bulk import shards
from engine.bulk.job import BulkJob, BulkResult, generate, merge
from engine.bulk.shards import Shard, merge_shards, read_shard, write_shard
from engine.diffusion.guidance import ClassifierFreeGuidance, ClassifierGuidance
from engine.diffusion.noise import RecordedNoise
from engine.errors import OutputError, RequestError
from engine.images import to_uint8
from engine.networks.classifier import AutogradGuide
from engine.sampling.options import SamplingOptions
from engine.sampling.sampler import Sampler

CONFIG = adm_unet(mult=(1,), attention=(), num_classes=5, null_class=2)
CLASSES = (0, 1, 3, 4)
JOB = BulkJob(10, SamplingOptions(steps=2, seed=5, batch_size=3), shard_size=4, threads=1)
# The same job as a command line.
OPTIONS = ("-n", 10, "--steps", 2, "--seed", 5, "--shard-size", 4, "--batch-size", 3, "--threads", 1)
SHARDS = {"npz": [f"shard-0000{i}.npz" for i in range(3)], "png": [f"shard-0000{i}" for i in range(3)]}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bulk") / "tiny.engine", CONFIG)


@pytest.fixture(scope="module")
def sampler(bundle) -> Iterator[Sampler]:
    opened = Sampler.open(bundle, "eager", "fp32", threads=1)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def forked() -> Iterator[ForkedRuns]:
    with ForkedRuns() as runs:
        yield runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory, forked, bundle) -> dict[str, Path]:
    """An uninterrupted run in each format."""
    folders = {}
    for file_format in SHARDS:
        folders[file_format] = tmp_path_factory.mktemp("finished") / file_format
        outcome = forked.run(command(bundle, folders[file_format], file_format), folders[file_format])
        assert outcome["exit"] == 0, outcome
    return folders


def command(bundle: Path, out: Path, file_format: str = "npz", *options: object) -> tuple[object, ...]:
    backend = ("--backend", "eager", "--precision", "fp32")
    return ("sample", bundle, *OPTIONS, *backend, "--format", file_format, "--out", out, *options)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def resume(bundle: Path, out: Path, *options: object) -> Outcome:
    return call_main(*command(bundle, out, "npz", *options))


def test_what_a_shard_holds(finished, sampler):
    folder = finished["npz"]
    assert names(folder) == ["run.json", *SHARDS["npz"]]
    expected = images.to_uint8(sampler.sample(10, steps=2, seed=5))
    labels = [r.label for r in sampler.requests(10, table=sampler.table(steps=2, sampler="ddim"), seed=5)]
    for i, size in enumerate((4, 4, 2)):
        with np.load(folder / f"shard-0000{i}.npz") as stored:
            assert sorted(stored.files) == ["arr_0", "arr_1", "seeds"]
            assert stored["arr_0"].shape == (size, 8, 8, 1)
            # A batch of another size may round a byte differently.
            assert np.abs(stored["arr_0"].astype(int) - expected[4 * i : 4 * i + size]).max() <= 1
            assert stored["arr_1"].tolist() == labels[4 * i : 4 * i + size]
            assert stored["seeds"].tolist() == list(range(5 + 4 * i, 5 + 4 * i + size))
    # Different seeds are different images.
    assert len({image.tobytes() for image in expected}) == 10


def test_png_shards_hold_the_same_images(finished):
    folder = finished["png"]
    assert names(folder) == ["run.json", *SHARDS["png"]]
    assert names(folder / "shard-00002") == ["000008.png", "000009.png", "shard.csv"]
    with np.load(finished["npz"] / "shard-00002.npz") as stored:
        array, labels, seeds = stored["arr_0"], stored["arr_1"], stored["seeds"]
    shard = Shard(2, 8, tuple(seeds.tolist()), tuple(labels.tolist()), (8, 8, 1))
    assert np.array_equal(read_shard(folder, shard, "png"), array)
    rows = [line.split(",") for line in (folder / "shard-00002" / "shard.csv").read_text().splitlines()]
    assert rows == [["index", "seed", "label"], *([str(8 + i), str(13 + i), str(labels[i])] for i in range(2))]


def test_the_run_description(finished, bundle):
    data = json.loads((finished["npz"] / "run.json").read_text())
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert data["bundle"] == {
        "manifest_sha256": manifest["manifest_sha256"],
        "checkpoint_sha256": manifest["checkpoint_sha256"],
    }
    table = data["table"]
    assert (table["sampler"], table["steps"], table["eta"], table["rows"]) == ("ddim", "2", 0.0, 2)
    assert (data["images"], data["shard_size"], data["batch_size"], data["format"]) == (10, 4, 3, "npz")
    assert data["seeds"] == {"first": 5, "last": 14}
    assert data["labels"] == "drawn"
    assert data["versions"]["torch"] == torch.__version__
    assert (data["machine"]["backend"], data["machine"]["precision"]) == ("eager", "fp32")


@pytest.mark.parametrize("file_format", ["npz", "png"])
def test_killed_before_file_operations(tmp_path, forked, finished, bundle, file_format):
    """SIGKILL just before opens, renames and removals in turn, then a resume: the bytes of an undisturbed run."""
    expected = content(finished[file_format])
    out, numbers = tmp_path / "out", range(1, 100)
    states = Counter()
    # Each costs two runs: every second, and of the many alike ones of PNG files every ninth.
    for operation in numbers[:: 2 if file_format == "npz" else 9]:
        killed = forked.run(command(bundle, out, file_format), out, operation=operation)
        if killed["exit"] == 0:
            break
        assert killed["signal"] == signal.SIGKILL, killed
        whole = [name for name in names(out) if name.startswith("shard-")]
        states[len(whole)] += 1
        kept = {name: value for name, value in content(out).items() if not name.startswith(".tmp-")}
        assert kept.items() <= expected.items()
        again = forked.run(command(bundle, out, file_format), out)
        assert again["exit"] == 0, again
        assert f"{10 - min(10, 4 * len(whole))} made" in again["err"]
        assert content(out) == expected
        shutil.rmtree(out)
    assert killed["exit"] == 0
    # Kills left none, one and two whole shards behind.
    assert set(states) == {0, 1, 2}


def kill_at_random_moments(
    tmp_path: Path, forked: ForkedRuns, finished: dict[str, Path], bundle: Path, times: int, seed: int
) -> None:
    """Kill one run after another in the same folder; the last is left to end."""
    for file_format in SHARDS:
        out = tmp_path / file_format
        length = forked.run(command(bundle, tmp_path / "timing", file_format), tmp_path / "timing")["seconds"]
        shutil.rmtree(tmp_path / "timing")
        draw = random.Random(seed)
        kills = 0
        while kills < times:
            outcome = forked.run(command(bundle, out, file_format), out, seconds=draw.uniform(0.2, 1.1) * length)
            if outcome["signal"] == signal.SIGKILL:
                kills += 1
            else:
                # It won the race; begin another one.
                assert content(out) == content(finished[file_format])
                shutil.rmtree(out)
        assert forked.run(command(bundle, out, file_format), out)["exit"] == 0
        assert content(out) == content(finished[file_format])


def test_killed_at_random_moments(tmp_path, forked, finished, bundle):
    kill_at_random_moments(tmp_path, forked, finished, bundle, times=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_twenty_times_at_random_moments(tmp_path, forked, finished, bundle, seed):
    kill_at_random_moments(tmp_path, forked, finished, bundle, times=20, seed=seed)


@pytest.mark.parametrize("file_format", ["npz", "png"])
def test_ctrl_c_leaves_whole_shards(tmp_path, forked, finished, bundle, file_format):
    out = tmp_path / "out"
    total = forked.run(command(bundle, out, file_format), out)["operations"]
    shutil.rmtree(out)
    outcome = forked.run(command(bundle, out, file_format), out, operation=total * 2 // 3, signal_number=signal.SIGINT)
    assert outcome["exit"] == 130, outcome
    assert "Traceback" not in outcome["err"]
    left = content(out)
    assert left.items() < content(finished[file_format]).items()
    assert "run.json" in left
    assert len(left) > 1
    assert forked.run(command(bundle, out, file_format), out)["exit"] == 0
    assert content(out) == content(finished[file_format])


def test_a_resumed_shard_is_made_in_the_same_batches(tmp_path, sampler):
    """On every backend the bits can hang on the batch: its sizes and the steps in it must not depend on a resume."""
    calls: list[tuple[tuple[int, ...], tuple[float, ...]]] = []

    class Spy:
        name, precision, device = sampler.backend.name, sampler.backend.precision, sampler.backend.device
        manifest = sampler.backend.manifest

        def __call__(self, x_t, timestep, conditions):
            calls.append((tuple(x_t.shape), tuple(timestep.tolist()), x_t.numpy().tobytes()))
            return sampler.backend(x_t, timestep, conditions)

        def close(self):
            pass

    generate(Sampler(Spy()), JOB, tmp_path)
    undisturbed = list(calls)
    # Four images in three slots, twice, then two images.
    assert [call[0][0] for call in undisturbed] == [3, 3, 1, 1, 3, 3, 1, 1, 2, 2]
    calls.clear()
    (tmp_path / "shard-00001.npz").unlink()
    assert generate(Sampler(Spy()), JOB, tmp_path) == BulkResult(made=4, kept=6)
    assert calls == undisturbed[4:8]
    calls.clear()
    assert generate(Sampler(Spy()), JOB, tmp_path) == BulkResult(made=0, kept=10)
    assert not calls


def test_progress_counts_images(tmp_path, sampler):
    seen: list[int] = []
    generate(sampler, JOB, tmp_path, progress=seen.append)
    assert seen == list(range(11))
    seen.clear()
    (tmp_path / "shard-00002.npz").unlink()
    generate(sampler, JOB, tmp_path, progress=seen.append)
    assert seen == [8, 9, 10]


def test_balanced_labels(tmp_path, bundle):
    """Classes take turns: the null class has none, and any whole shards are balanced as well as they can be."""
    options = ("--class", "3"), ("--per-class", "-n", 12)
    for i, extra in enumerate(options):
        assert resume(bundle, tmp_path / str(i), *extra).status == 0
    with np.load(tmp_path / "0" / "shard-00000.npz") as stored:
        assert stored["arr_1"].tolist() == [3, 3, 3, 3]
    for number in range(3):
        with np.load(tmp_path / "1" / f"shard-0000{number}.npz") as stored:
            assert stored["arr_1"].tolist() == list(CLASSES)
    assert json.loads((tmp_path / "1" / "run.json").read_text())["labels"] == {"in_turn": list(CLASSES)}


def test_labels_in_turn_across_shards_and_drawn_ones():
    job = BulkJob(11, SamplingOptions(seed=3), labels_in_turn=(7, 8, 9), shard_size=4)
    options = [job.options_of(job.images_of(i)) for i in range(job.num_shards)]
    assert [one.labels for one in options] == [[7, 8, 9, 7], [8, 9, 7, 8], [9, 7, 8]]
    assert [one.seed for one in options] == [3, 7, 11]
    assert BulkJob(11, SamplingOptions(labels=7)).options_of(range(4)).labels == 7
    assert BulkJob(11).options_of(range(4)).labels is None


def test_an_unlabelled_network_has_no_labels(tmp_path):
    plain = Sampler.open(write_bundle(tmp_path / "u.engine", adm_unet(mult=(1,), attention=())), "eager", threads=1)
    for file_format in SHARDS:
        job = BulkJob(3, SamplingOptions(steps=1), shard_size=2, file_format=file_format)
        generate(plain, job, tmp_path / file_format)
        assert generate(plain, job, tmp_path / file_format).made == 0
        with np.load(merge(plain, job, tmp_path / file_format)) as stored:
            assert stored.files == ["arr_0"]
        assert json.loads((tmp_path / file_format / "run.json").read_text())["labels"] is None
    with pytest.raises(RequestError, match="takes no labels"):
        generate(plain, BulkJob(3, SamplingOptions(steps=1, labels=1)), tmp_path / "no")


CHANGES = {
    'table.steps was "2" and is "3"; table.rows was 2 and is 3': ("--steps", 3),
    "table.eta was 0.0 and is 0.5; table.sha256 was": ("--eta", 0.5),
    "images was 10 and is 12; seeds.last was 14 and is 16. Resume with the settings of run.json": ("-n", 12),
    "seeds.first was 5 and is 6": ("--seed", 6),
    'labels was "drawn" and is {"all": 1}.': ("--class", 1),
    "shard_size was 4 and is 5.": ("--shard-size", 5),
    "batch_size was 3 and is 4.": ("--batch-size", 4),
    'format was "npz" and is "png".': ("--format", "png"),
    "machine.threads was 1 and is 2.": ("--threads", 2),
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_resume_with_other_settings_is_refused(tmp_path, finished, bundle, message):
    out = tmp_path / "out"
    shutil.copytree(finished["npz"], out)
    (out / "shard-00001.npz").unlink()
    before = content(out)
    error = resume(bundle, out, *CHANGES[message]).error
    assert error.startswith(f"{out} was begun with other settings: ")
    assert message in error
    assert error.rstrip().endswith("or choose another folder")
    assert content(out) == before


def test_another_bundle_or_version_is_refused(tmp_path, finished, bundle):
    out = tmp_path / "out"
    shutil.copytree(finished["npz"], out)
    other = write_bundle(tmp_path / "other.engine", CONFIG, seed=1)
    assert "settings: bundle.manifest_sha256 was" in resume(other, out).error
    data = json.loads((out / "run.json").read_text())
    data["versions"]["torch"] = "2.0.1"
    data["machine"]["device"] = "Another Processor"
    (out / "run.json").write_text(json.dumps(data))
    error = resume(bundle, out).error
    assert 'machine.device was "Another Processor" and is' in error
    assert f'versions.torch was "2.0.1" and is "{torch.__version__}"' in error


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def change_label(path: Path) -> None:
    with np.load(path) as stored:
        arrays = dict(stored)
    arrays["arr_1"][1] ^= 1
    np.savez(path, **arrays)


def another_type(path: Path) -> None:
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez(path, **(arrays | {"arr_0": arrays["arr_0"].astype(np.int16)}))


def pickled(path: Path) -> None:
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez(path, **(arrays | {"arr_0": np.array([{}], dtype=object)}))


DAMAGES = {
    "truncated": ("npz", lambda out: truncate(out / "shard-00001.npz")),
    "empty": ("npz", lambda out: os.truncate(out / "shard-00001.npz", 0)),
    "one bit": ("npz", lambda out: flip(out / "shard-00001.npz")),
    "another shard's": ("npz", lambda out: shutil.copy(out / "shard-00000.npz", out / "shard-00001.npz")),
    "a label": ("npz", lambda out: change_label(out / "shard-00001.npz")),
    "type": ("npz", lambda out: another_type(out / "shard-00001.npz")),
    "pickled": ("npz", lambda out: pickled(out / "shard-00001.npz")),
    "png missing": ("png", lambda out: (out / "shard-00001" / "000005.png").unlink()),
    "png truncated": ("png", lambda out: truncate(out / "shard-00001" / "000005.png")),
    "png one bit": ("png", lambda out: flip(out / "shard-00001" / "000005.png")),
    "png too many": ("png", lambda out: (out / "shard-00001" / "000099.png").touch()),
    "png table": ("png", lambda out: truncate(out / "shard-00001" / "shard.csv")),
    "png size": ("png", lambda out: images.save_png(out / "shard-00001" / "000005.png", np.zeros((4, 8, 1), np.uint8))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_made_again(tmp_path, finished, bundle, damage):
    file_format, do = DAMAGES[damage]
    out = tmp_path / "out"
    shutil.copytree(finished[file_format], out)
    do(out)
    expected = content(finished[file_format])
    assert content(out) != expected
    untouched = (out / SHARDS[file_format][0]).stat()
    outcome = call_main(*command(bundle, out, file_format))
    assert outcome.status == 0, outcome
    assert f"{SHARDS[file_format][1]} was damaged and was made again" in outcome.err
    assert "4 made" in outcome.out
    assert "6 were there" in outcome.out
    assert content(out) == expected
    after = (out / SHARDS[file_format][0]).stat()
    assert (after.st_ino, after.st_mtime_ns) == (untouched.st_ino, untouched.st_mtime_ns)


def test_folders_that_are_no_run(tmp_path, finished, bundle):
    out = tmp_path / "out"
    shutil.copytree(finished["npz"], out)
    (out / "notes.txt").write_text("mine")
    shutil.copy(out / "shard-00000.npz", out / "shard-00007.npz")
    assert "holds shard-00007.npz, which is no shard of this run (3 shards of 4 images as npz); move it away" in (
        resume(bundle, out).error
    )
    (out / "shard-00007.npz").unlink()
    assert resume(bundle, out).status == 0
    text = (out / "run.json").read_text()
    (out / "run.json").write_text(text[:50])
    assert f"{out / 'run.json'} is damaged" in resume(bundle, out).error
    (out / "run.json").unlink()
    assert "holds shard-00000.npz but no run.json, so that nobody knows how it was made" in resume(bundle, out).error
    assert (out / "notes.txt").read_text() == "mine"


def test_only_leftovers_of_ours_are_removed(tmp_path, sampler):
    (tmp_path / f".tmp-{'0' * 32}.npz").write_text("half")
    (tmp_path / f".tmp-{'a' * 32}").mkdir()
    (tmp_path / f".tmp-{'a' * 32}" / "000000.png").write_text("half")
    (tmp_path / ".tmp-mine").write_text("kept")
    generate(sampler, JOB, tmp_path)
    assert names(tmp_path) == [".tmp-mine", "run.json", *SHARDS["npz"]]


def test_a_full_disk(tmp_path, finished, bundle, monkeypatch):
    """The error names the shard and the remedy; what was whole stays, and with space the run ends as it would have."""
    out = tmp_path / "out"
    real = shards._add

    def full(archive, name, array):
        if name == "seeds" and 9 in array:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(archive, name, array)

    monkeypatch.setattr(shards, "_add", full)
    error = resume(bundle, out).error
    assert error.startswith(f"cannot write {out / 'shard-00001.npz'}: No space left on device; free space on this disk")
    assert names(out) == ["run.json", "shard-00000.npz"]
    monkeypatch.setattr(shards, "_add", real)
    assert resume(bundle, out).status == 0
    assert content(out) == content(finished["npz"])


def test_a_file_size_limit(tmp_path, finished, bundle):
    """A limit that the operating system itself enforces, in the midst of a write."""
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(finished["npz"] / "run.json", out)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        outcome = resume(bundle, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "shard-00000.npz: File too large; raise the file size limit" in outcome.error
    assert names(out) == ["run.json"]
    assert resume(bundle, out).status == 0
    assert content(out) == content(finished["npz"])


@pytest.mark.parametrize("file_format", ["npz", "png"])
def test_merged_samples_for_the_evaluator(tmp_path, finished, bundle, file_format):
    out = tmp_path / "out"
    shutil.copytree(finished[file_format], out)
    outcome = call_main(*command(bundle, out, file_format, "--merge", "--json"))
    assert json.loads(outcome.out)["merged"] == str(out / "samples.npz")
    parts = [np.load(finished["npz"] / name) for name in SHARDS["npz"]]
    with np.load(out / "samples.npz", allow_pickle=False) as stored:
        assert stored.files == ["arr_0", "arr_1"]
        assert stored["arr_0"].dtype == np.uint8
        assert stored["arr_1"].dtype == np.int64
        assert np.array_equal(stored["arr_0"], np.concatenate([part["arr_0"] for part in parts]))
        assert np.array_equal(stored["arr_1"], np.concatenate([part["arr_1"] for part in parts]))
    for part in parts:
        part.close()
    # It is no shard: the next resume and merge are as before.
    first = (out / "samples.npz").read_bytes()
    assert call_main(*command(bundle, out, file_format, "--merge")).status == 0
    assert (out / "samples.npz").read_bytes() == first


def test_a_merge_holds_one_shard_in_memory(tmp_path):
    size, count = 1 << 20, 12
    parts = [Shard(i, i, (i,), (i,), (1024, 1024, 1)) for i in range(count)]
    for part in parts:
        write_shard(tmp_path, part, np.full((1, 1024, 1024, 1), part.number, dtype=np.uint8), "npz")
    tracemalloc.start()
    merge_shards(tmp_path, parts, "npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * size
    with np.load(tmp_path / "samples.npz") as stored:
        assert stored["arr_0"].shape == (count, 1024, 1024, 1)
        assert stored["arr_0"][:, 0, 0, 0].tolist() == list(range(count))


def test_a_merge_of_an_unfinished_run(tmp_path, finished, sampler):
    shutil.copytree(finished["npz"], tmp_path, dirs_exist_ok=True)
    # The description was written in another process with the same settings.
    truncate(tmp_path / "shard-00001.npz")
    with pytest.raises(RequestError, match=r"shard-00001.npz is missing or damaged; run the same command again"):
        merge_shards(tmp_path, bulk._Run(sampler, JOB, tmp_path).shards(), "npz")
    with pytest.raises(RequestError, match="shard_size was 4 and is 5"):
        merge(sampler, dataclasses.replace(JOB, shard_size=5), tmp_path)
    assert "samples.npz" not in names(tmp_path)
    with pytest.raises(OutputError, match="cannot open .*nowhere: No such file"):
        merge(sampler, JOB, tmp_path / "nowhere")


def test_one_process_at_a_time(tmp_path, sampler):
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(OutputError, match="another process is writing to .*; wait until it ends"):
        generate(sampler, JOB, tmp_path)
    os.close(handle)
    assert generate(sampler, JOB, tmp_path).made == 10


def test_guidance_is_part_of_the_run(tmp_path, bundle):
    classifier = write_checkpoint(tmp_path / "c.pt", adm_classifier(mult=(1,), attention=(), num_classes=5))
    guided = ("--classifier", classifier, "--classifier-fact", "num_head_channels=32")
    out = tmp_path / "out"
    assert resume(bundle, out, *guided).status == 0
    assert json.loads((out / "run.json").read_text())["guidance"]["scale"] == 1.0
    assert "guidance.scale was 1.0 and is 2.0" in resume(bundle, out, *guided, "--classifier-scale", 2).error
    assert "is null" in resume(bundle, out).error
    write_checkpoint(classifier, adm_classifier(mult=(1,), attention=(), num_classes=5), seed=1)
    assert "guidance.classifier_sha256 was" in resume(bundle, out, *guided).error


def test_a_job_that_fails_at_once_can_be_mended(tmp_path, sampler):
    """Nothing is described before the first shard is made, so that the mended job is not refused."""
    wrong = random_network(adm_classifier(mult=(1,), attention=(), num_classes=5, size=(16, 16)))
    guidance = ClassifierGuidance(AutogradGuide(wrong))
    job = BulkJob(4, SamplingOptions(steps=2, guidance=guidance), classifier_sha256="00")
    with pytest.raises(RequestError, match="the classifier reads 1 channels of"):
        generate(sampler, job, tmp_path)
    assert names(tmp_path) == []
    for given, sha in ((None, "00"), (guidance, None)):
        with pytest.raises(RequestError, match="guidance and the job's classifier_sha256 belong together"):
            BulkJob(4, SamplingOptions(steps=2, guidance=given), classifier_sha256=sha)
    assert generate(sampler, JOB, tmp_path).made == 10


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, "n is 0; expected 1 or more"),
        ({"shard_size": 0}, "shard_size is 0; expected 1 or more"),
        ({"options": {"batch_size": -1}}, "batch_size is -1; expected 1 or more"),
        ({"options": {"seed": -1}}, "seed is -1 for 10 images; expected 0 <= seed"),
        ({"options": {"seed": 2**64 - 9}}, "seed is 18446744073709551607 for 10 images"),
        ({"options": {"seeds": range(10)}}, "images in shards have seeds in a row; leave seeds, image, noise out"),
        ({"options": {"noise": RecordedNoise}}, "leave seeds, image, noise out"),
        ({"options": {"steps": [1, 2]}}, "need steps that run.json can hold"),
        ({"options": {"labels": [1, 2]}}, "one class for all, or labels_in_turn"),
        ({"options": {"labels": 1}, "labels_in_turn": (1, 2)}, "give one of them"),
        ({"file_format": "jpg"}, "unknown shard format 'jpg'; known: npz, png"),
        ({"labels_in_turn": ()}, "labels_in_turn is empty; give the classes"),
    ],
)
def test_impossible_jobs(fields, message):
    with pytest.raises(RequestError, match=message):
        BulkJob(**({"n": 10} | fields | {"options": SamplingOptions(**fields.get("options", {}))}))


def test_the_last_seed_of_all_is_possible(tmp_path, sampler):
    generate(sampler, BulkJob(2, SamplingOptions(steps=1, seed=2**64 - 2)), tmp_path)
    with np.load(tmp_path / "shard-00000.npz") as stored:
        assert stored["seeds"].tolist() == [2**64 - 2, 2**64 - 1]


REFUSALS = {
    "--merge joins shards, and this run has none; give --shard-size": ("-n", 4, "--merge", "--out", "OUT"),
    "shards need a folder; give --out DIR": ("-n", 4, "--shard-size", 2, "--grid", "g.png"),
    "--grid shows one run without shards; leave it out": ("-n", 1001, "--out", "OUT", "--grid", "g.png"),
    "shard_size is 0; expected 1 or more": ("-n", 4, "--shard-size", 0, "--out", "OUT"),
    "--per-class needs a multiple of the 4 classes, got -n 1001": ("-n", 1001, "--per-class", "--out", "OUT"),
    "label 5 does not exist": ("-n", 1001, "--class", 5, "--out", "OUT"),
    "cannot write OUT/below": ("-n", 1001, "--out", "OUT/below"),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refused_command_lines(tmp_path, monkeypatch, bundle, message):
    monkeypatch.chdir(tmp_path)
    if message == "cannot write OUT/below":
        Path("OUT").write_text("")
    assert message in call_main("sample", bundle, "--steps", 2, *REFUSALS[message]).error
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]


def test_more_than_a_thousand_images_are_made_in_shards(tmp_path, bundle):
    outcome = call_main("sample", bundle, "-n", 1001, "--steps", 1, "--batch-size", 256, "--out", tmp_path, "--json")
    data = json.loads(outcome.out)
    assert (data["images"], data["made"], data["kept"], data["shards"], data["shard_size"]) == (1001, 1001, 0, 4, 256)
    assert data["images_per_second"] > 0
    assert names(tmp_path) == ["run.json", *(f"shard-0000{i}.npz" for i in range(4))]


@pytest.mark.slow
def test_resumes_on_the_backends_of_a_graph(tmp_path, bundle):
    """OpenVINO and ONNX Runtime give a shard's bytes again, in a session that did not make the shards before it."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    from engine.backends.ort.ort_backend import OrtBackend
    from engine.backends.ov.ov_backend import OpenVINOBackend
    from engine.bundle.bundle_folder import Bundle
    from export.to_onnx import export_onnx

    manifest, path = Bundle.open(bundle).manifest, tmp_path / "unet.onnx"
    export_onnx(random_network(CONFIG), path)
    for backend in (OrtBackend, OpenVINOBackend):
        out = tmp_path / backend.name
        generate(Sampler(backend(manifest, path, "fp32", 1)), JOB, out)
        expected = content(out)
        for number in (1, 2):
            (out / f"shard-0000{number}.npz").unlink()
        assert generate(Sampler(backend(manifest, path, "fp32", 1)), JOB, out) == BulkResult(made=6, kept=4)
        assert content(out) == expected


@pytest.mark.parametrize("cfg", [ClassifierFreeGuidance(3.0), ClassifierFreeGuidance(0.6, plus_plus=True)])
def test_classifier_free_guidance_is_part_of_the_run(tmp_path, cfg):
    bundle = write_bundle(tmp_path / "net.engine", adm_unet(num_classes=4, null_class=3))
    sampler = Sampler.open(bundle, "eager")
    plain = BulkJob(4, SamplingOptions(steps=3, batch_size=2, labels=1), shard_size=2)
    guided = dataclasses.replace(plain, options=dataclasses.replace(plain.options, guidance_scale=cfg))
    generate(sampler, guided, tmp_path / "guided")
    wanted = to_uint8(sampler.sample(2, steps=3, labels=1, guidance_scale=cfg, batch_size=2))
    with np.load(tmp_path / "guided" / "shard-00000.npz") as shard:
        assert np.array_equal(shard["arr_0"], wanted)
    with pytest.raises(RequestError, match="classifier_free_guidance"):
        generate(sampler, plain, tmp_path / "guided")
