"""engine.files: whole or not at all, and errors that say what to do."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path

import pytest

from engine.errors import OutputError
from engine.files import atomic_folder, atomic_path, make_folder

MARKER = "made_by_us"
NEVER = AssertionError("the block must not run")


def is_ours(folder: Path) -> bool:
    return (folder / MARKER).exists()


def our_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / MARKER).write_text("old")
    return folder


def write_file(target: Path, failure: BaseException | None = None) -> None:
    with atomic_path(target) as temp:
        temp.write_text("new")
        if failure is not None:
            raise failure


def write_folder(target: Path, failure: BaseException | None = None) -> None:
    with atomic_folder(target, is_ours) as temp:
        (temp / MARKER).write_text("new")
        if failure is not None:
            raise failure


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def os_error(code: int, filename: object = None) -> OSError:
    return OSError(code, os.strerror(code), filename)


class TestAtomicPath:
    def test_target_appears_when_the_block_ends(self, tmp_path: Path) -> None:
        target = tmp_path / "a.json"
        with atomic_path(target) as temp:
            temp.write_text("new")
            assert not target.exists()
            assert temp.parent == tmp_path
            assert temp.name.startswith(".")
            assert temp.suffix == ".json"
        assert target.read_text() == "new"
        assert names(tmp_path) == ["a.json"]

    def test_two_writers_do_not_share_a_temporary_name(self, tmp_path: Path) -> None:
        with atomic_path(tmp_path / "a") as first, atomic_path(tmp_path / "a") as second:
            assert first != second
        assert names(tmp_path) == ["a"]

    def test_permissions_are_those_of_a_usual_file(self, tmp_path: Path) -> None:
        (tmp_path / "usual").touch()
        write_file(tmp_path / "a")
        assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode

    def test_a_relative_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        write_file(Path("a"))
        assert names(tmp_path) == ["a"]

    def test_a_link_is_followed(self, tmp_path: Path) -> None:
        (tmp_path / "real").write_text("old")
        (tmp_path / "link").symlink_to("real")
        write_file(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real").read_text() == "new"

    @pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
    def test_a_failing_block_leaves_the_old_file(self, tmp_path: Path, failure: type[BaseException]) -> None:
        target = tmp_path / "a"
        target.write_text("old")
        with pytest.raises(failure):
            write_file(target, failure())
        assert target.read_text() == "old"
        assert names(tmp_path) == ["a"]

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            (errno.ENOSPC, "No space left on device; free space on this disk, or choose a path on another"),
            (errno.EDQUOT, "quota exceeded; free space within your quota, or choose a path on another disk"),
            (errno.EFBIG, "File too large; raise the file size limit, or choose a path on another disk"),
            (errno.EACCES, "Permission denied; choose a folder that you may write to"),
            (errno.EROFS, "Read-only file system; choose a path on a disk that is not read-only"),
            (errno.EIO, "Input/output error; choose another path"),
        ],
    )
    def test_a_failing_write_names_target_reason_and_remedy(self, tmp_path: Path, code: int, message: str) -> None:
        target = tmp_path / "a"
        with pytest.raises(OutputError) as error:
            write_file(target, os_error(code))
        assert str(error.value).startswith(f"cannot write {target}: ")
        assert message in str(error.value)
        assert names(tmp_path) == []

    def test_an_error_without_a_number_still_has_a_reason(self, tmp_path: Path) -> None:
        # numpy's tofile raises such an error on a full disk.
        with pytest.raises(OutputError, match="100 requested and 7 written; choose another path"):
            write_file(tmp_path / "a", OSError("100 requested and 7 written"))

    @pytest.mark.parametrize("filename", ["/elsewhere/input", b"/elsewhere/input", 7])
    def test_an_error_about_another_file_passes_unchanged(self, tmp_path: Path, filename: object) -> None:
        failure = os_error(errno.ENOENT, filename)
        with pytest.raises(FileNotFoundError) as error:
            write_file(tmp_path / "a", failure)
        assert error.value is failure
        assert names(tmp_path) == []

    def test_a_failing_rename(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(source: Path, destination: Path) -> None:
            raise os_error(errno.EPERM, str(source))

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OutputError, match="Operation not permitted; choose a folder that you may write"):
            write_file(tmp_path / "a")
        assert names(tmp_path) == []

    def test_impossible_paths_fail_before_the_block(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        cases = {
            tmp_path / "missing" / "a": "No such file or directory; create the folder first",
            tmp_path / "file" / "a": "Not a directory; one part of the path is a file; choose another path",
            tmp_path / ("b" * 300) / "a": "File name too long; choose a shorter name",
            tmp_path: "it is a folder; choose the name of a file",
        }
        for target, message in cases.items():
            with pytest.raises(OutputError, match=message) as error:
                write_file(target, NEVER)
            assert str(error.value).startswith(f"cannot write {target}: ")
        assert names(tmp_path) == ["file"]

    def test_a_link_to_itself(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to("a")
        for write in (write_file, write_folder):
            with pytest.raises(OutputError, match="Too many levels of symbolic links; choose another path"):
                write(tmp_path / "a", NEVER)
        assert names(tmp_path) == ["a"]

    def test_the_longest_name_fits(self, tmp_path: Path) -> None:
        write_file(tmp_path / ("a" * 255))
        with pytest.raises(OutputError, match="File name too long; choose a shorter name"):
            write_file(tmp_path / ("a" * 256), NEVER)
        assert names(tmp_path) == ["a" * 255]

    def test_an_unwritable_folder_fails_before_the_block(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Simulated: root may write anywhere.
        def fail(path: Path, exist_ok: bool = True) -> None:
            raise os_error(errno.EACCES, str(path))

        monkeypatch.setattr(Path, "touch", fail)
        with pytest.raises(OutputError, match="Permission denied; choose a folder that you may write to"):
            write_file(tmp_path / "a", NEVER)


class TestAtomicFolder:
    def test_target_appears_when_the_block_ends(self, tmp_path: Path) -> None:
        target = tmp_path / "model.engine"
        with atomic_folder(target, is_ours) as temp:
            (temp / MARKER).write_text("new")
            (temp / "plans").mkdir()
            assert not target.exists()
            assert temp.parent == tmp_path
            assert temp.name.startswith(".")
        assert names(target) == [MARKER, "plans"]
        assert names(tmp_path) == ["model.engine"]

    def test_our_own_folder_is_replaced_as_a_whole(self, tmp_path: Path) -> None:
        target = our_folder(tmp_path / "model.engine")
        (target / "stale.plan").touch()
        with atomic_folder(target, is_ours) as temp:
            (temp / MARKER).write_text("new")
            assert names(target) == [MARKER, "stale.plan"]
        assert names(target) == [MARKER]
        assert (target / MARKER).read_text() == "new"
        assert names(tmp_path) == ["model.engine"]

    def test_a_link_to_our_folder_is_followed(self, tmp_path: Path) -> None:
        our_folder(tmp_path / "real")
        (tmp_path / "link").symlink_to("real")
        write_folder(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real" / MARKER).read_text() == "new"
        assert names(tmp_path) == ["link", "real"]

    def test_what_is_not_ours_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "cat").touch()
        (tmp_path / "file").touch()
        cases = {"photos": "it is a folder that this program did not write", "file": "it is a file"}
        for name, message in cases.items():
            with pytest.raises(OutputError) as error:
                write_folder(tmp_path / name, NEVER)
            assert str(error.value) == (
                f"cannot write {tmp_path / name}: {message}; choose another path, or remove it first"
            )
        assert names(tmp_path) == ["file", "photos"]
        assert names(tmp_path / "photos") == ["cat"]

    def test_a_folder_that_appears_meanwhile_is_left_alone(self, tmp_path: Path) -> None:
        target = tmp_path / "model.engine"

        def write_while_another_program_does() -> None:
            with atomic_folder(target, is_ours):
                target.mkdir()
                (target / "cat").touch()

        with pytest.raises(OutputError, match="it is a folder that this program did not write"):
            write_while_another_program_does()
        assert names(target) == ["cat"]
        assert names(tmp_path) == ["model.engine"]

    @pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
    def test_a_failing_block_leaves_the_old_folder(self, tmp_path: Path, failure: type[BaseException]) -> None:
        target = our_folder(tmp_path / "model.engine")
        with pytest.raises(failure):
            write_folder(target, failure())
        assert (target / MARKER).read_text() == "old"
        assert names(tmp_path) == ["model.engine"]

    def test_a_full_disk(self, tmp_path: Path) -> None:
        target = tmp_path / "model.engine"

        def write_on_a_full_disk() -> None:
            with atomic_folder(target, is_ours) as temp:
                (temp / "unet.onnx").write_bytes(b"half")
                raise os_error(errno.ENOSPC, str(temp / "unet.onnx"))

        with pytest.raises(OutputError) as error:
            write_on_a_full_disk()
        assert str(error.value) == (
            f"cannot write {target}: No space left on device; free space on this disk, or choose a path on another one"
        )
        assert names(tmp_path) == []

    def test_an_impossible_place_fails_before_the_block(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        cases = {
            tmp_path / "file" / "x": "Not a directory; one part of the path is a file",
            tmp_path / "missing" / "x": "No such file or directory; create the folder first",
            tmp_path / ("x" * 256): "File name too long; choose a shorter name",
        }
        for target, message in cases.items():
            with pytest.raises(OutputError, match=message):
                write_folder(target, NEVER)
        assert names(tmp_path) == ["file"]

    def test_a_failing_swap_puts_the_old_folder_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        target = our_folder(tmp_path / "model.engine")
        rename = os.rename
        calls: list[Path] = []

        def fail_second(source: Path, destination: Path) -> None:
            calls.append(source)
            if len(calls) == 2:
                raise os_error(errno.EIO)
            rename(source, destination)

        monkeypatch.setattr(os, "rename", fail_second)
        with pytest.raises(OutputError, match="Input/output error; choose another path"):
            write_folder(target)
        assert len(calls) == 3
        assert (target / MARKER).read_text() == "old"
        assert names(tmp_path) == ["model.engine"]

    def test_an_old_folder_that_cannot_be_deleted_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        target = our_folder(tmp_path / "model.engine")
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with caplog.at_level(logging.WARNING):
            write_folder(target)
        assert (target / MARKER).read_text() == "new"
        assert f"which held the old {target}; remove it by hand" in caplog.text


class TestMakeFolder:
    def test_it_makes_all_that_is_missing(self, tmp_path: Path) -> None:
        make_folder(tmp_path / "a" / "b")
        make_folder(tmp_path / "a" / "b")
        assert (tmp_path / "a" / "b").is_dir()

    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.touch()
        cases = {
            file / "a": "Not a directory; one part of the path is a file; choose another path",
            file / "a" / "b": "Not a directory; one part of the path is a file; choose another path",
            file: "File exists; choose another path",
        }
        for folder, message in cases.items():
            with pytest.raises(OutputError) as error:
                make_folder(folder)
            assert str(error.value) == f"cannot write {folder}: {message}"
