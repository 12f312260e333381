"""Files and folders that appear whole or not at all.

What is written goes to a temporary name beside the target, `.tmp-...`, and is renamed at the end, so that a
reader never sees a half-written file and a failure leaves the old one. Only a killed process can leave a
`.tmp-...` behind.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from engine.errors import OutputError

logger = logging.getLogger(__name__)

REMEDIES = {
    errno.ENOSPC: "free space on this disk, or choose a path on another one",
    errno.EDQUOT: "free space within your quota, or choose a path on another disk",
    errno.EFBIG: "raise the file size limit, or choose a path on another disk",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a path on a disk that is not read-only",
    errno.ENOENT: "create the folder first, or choose another path",
    errno.ENOTDIR: "one part of the path is a file; choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def user_cache_folder(name: str) -> Path:
    """$XDG_CACHE_HOME/unet-rt/NAME, by default in ~/.cache: what may be deleted at any time and is made again."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "unet-rt" / name


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """An empty temporary file to write: it becomes target when the block ends, or vanishes if it fails.

    It lies beside target and has target's suffix, for writers that choose a format by name. An existing file
    is replaced; a link is followed. Raises OutputError before the block if target is a folder or its folder
    cannot be written, and after it for an OSError that the writing raised, a full disk say. An OSError that
    names a file somewhere else passes unchanged.
    """
    final = Path(os.path.realpath(target))
    temp = _beside(final, final.suffix)
    with _reported(target, final, temp):
        if _is_folder(final):
            raise OutputError(f"cannot write {target}: it is a folder; choose the name of a file")
        try:
            temp.touch(exist_ok=False)
            yield temp
            os.replace(temp, final)
        except BaseException:
            with suppress(OSError):
                temp.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_folder(target: Path, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """An empty temporary folder to fill: it becomes target when the block ends, or vanishes if it fails.

    An existing target is replaced as a whole if is_ours(target) is true. Anything else under that name, a
    file or a folder of somebody else, raises OutputError before the block. Other errors are those of
    atomic_path.
    """
    final = Path(os.path.realpath(target))
    temp = _beside(final)
    with _reported(target, final, temp):
        _check_replaceable(target, final, is_ours)
        try:
            temp.mkdir()
            yield temp
            # Asked again: what lies there may have changed while the block worked.
            _check_replaceable(target, final, is_ours)
            _swap(temp, final)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise


def make_folder(folder: Path) -> None:
    """Make folder and the folders above it where they are missing. Raises OutputError."""
    with _reported(folder, Path(os.path.realpath(folder))):
        folder.mkdir(parents=True, exist_ok=True)


def _beside(final: Path, suffix: str = "") -> Path:
    return final.with_name(f".tmp-{uuid.uuid4().hex}{suffix}")


def _check_replaceable(target: Path, final: Path, is_ours: Callable[[Path], bool]) -> None:
    is_folder = _is_folder(final)
    if is_folder is False or (is_folder and not is_ours(final)):
        kind = "folder that this program did not write" if is_folder else "file"
        raise OutputError(f"cannot write {target}: it is a {kind}; choose another path, or remove it first")


def _is_folder(path: Path) -> bool | None:
    """None where nothing has this name; OSError where it cannot be asked, as for a name that is too long."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        return None


def _swap(temp: Path, final: Path) -> None:
    """Rename temp to final; a folder that was there is renamed aside first and deleted last."""
    if _is_folder(final) is None:
        os.rename(temp, final)
        return
    aside = _beside(final)
    os.rename(final, aside)
    try:
        os.rename(temp, final)
    except BaseException:
        os.rename(aside, final)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    if aside.exists():
        logger.warning("could not delete all of %s, which held the old %s; remove it by hand", aside, final)


@contextmanager
def _reported(target: Path, *written: Path) -> Iterator[None]:
    """Turns an OSError of the block into an OutputError about target, unless it names an unrelated file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and not any(_is_about(error.filename, path) for path in written):
            raise
        reason = error.strerror or str(error)
        remedy = REMEDIES.get(error.errno or 0, "choose another path")
        raise OutputError(f"cannot write {target}: {reason}; {remedy}") from error


def _is_about(filename: object, written: Path) -> bool:
    """Whether an error's file name is the real path `written`, lies inside it, or is a folder above it."""
    if not isinstance(filename, (str, bytes, os.PathLike)):
        return False
    named = Path(os.path.realpath(os.fsdecode(filename)))
    return named == written or written in named.parents or named in written.parents


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
