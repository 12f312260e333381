"""engine.images: bytes, grids and files, and what is left behind when writing fails."""

from __future__ import annotations

import builtins
import errno
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.errors import OutputError, RequestError
from engine.images import grid, save_images, save_npz, save_png, to_uint8


def some_bytes(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


class FullDisk(io.FileIO):
    """A file that takes 40 bytes."""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file opened for writing bytes is on a full disk."""
    real = builtins.open

    def opener(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        writes = "b" in mode and set(mode) & set("wax")
        return FullDisk(file, mode.replace("b", "")) if writes else real(file, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", opener)
    monkeypatch.setattr(io, "open", opener)


class TestToUint8:
    def test_known_values(self) -> None:
        x = np.array([-2, -1, -0.999, 0, 0.5, 0.9999, 1, 3, np.inf, -np.inf], np.float32)
        got = to_uint8(x.reshape(1, 1, 1, -1))
        # 127.5 and 191.25 are truncated, as guided-diffusion does, and 254.99 too.
        assert got.ravel().tolist() == [0, 0, 0, 127, 191, 254, 255, 255, 255, 0]
        assert got.dtype == np.uint8

    @settings(max_examples=30, deadline=None)
    @given(
        shape=st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_the_bytes_are_those_of_guided_diffusion(self, shape: tuple[int, ...], seed: int) -> None:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        theirs = ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        for images in (x, x.numpy()):
            got = to_uint8(images)
            assert got.flags.c_contiguous
            np.testing.assert_array_equal(got, theirs)

    def test_every_byte_survives_the_way_through_floats(self) -> None:
        levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
        # The middle of each byte's interval, so that truncation returns to it.
        floats = ((levels.astype(np.float32) + 0.5) / 127.5 - 1).transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(to_uint8(floats), levels)

    def test_half_precision_and_gradients_are_accepted(self) -> None:
        x = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 1, 1, 3)
        for images in (x.bfloat16(), x.half(), x.double(), x.clone().requires_grad_()):
            assert to_uint8(images).ravel().tolist() == [0, 127, 255]

    def test_the_input_is_not_changed(self) -> None:
        x = np.zeros((1, 1, 2, 2), np.float32)
        to_uint8(x)
        assert (x == 0).all()

    def test_wrong_layouts(self) -> None:
        with pytest.raises(RequestError, match=r"are float32 \[3, 4, 4\]; expected floats \[n, C, H, W\]"):
            to_uint8(np.zeros((3, 4, 4), np.float32))
        with pytest.raises(RequestError, match=r"images are uint8 \[1, 4, 4, 3\]; expected floats"):
            to_uint8(some_bytes(1, 4, 4, 3))

    def test_nan_is_reported_not_painted(self) -> None:
        x = np.zeros((4, 1, 2, 2), np.float32)
        x[2, 0, 1, 1] = x[3, 0, 0, 0] = np.nan
        with pytest.raises(RequestError, match="2 of 4 images hold NaN, the first is image 2; .* fp32"):
            to_uint8(x)


class TestGrid:
    def test_images_run_along_rows(self) -> None:
        images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1)
        assert grid(images, columns=3)[..., 0].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert grid(images, columns=2)[..., 0].tolist() == [[0, 1], [2, 3], [4, 5]]

    def test_missing_places_are_black(self) -> None:
        images = np.arange(1, 6, dtype=np.uint8).reshape(5, 1, 1, 1)
        assert grid(images, columns=3)[..., 0].tolist() == [[1, 2, 3], [4, 5, 0]]
        assert grid(images[:1], columns=3)[..., 0].tolist() == [[1, 0, 0]]

    @settings(max_examples=50, deadline=None)
    @given(
        n=st.integers(1, 9),
        size=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)),
        columns=st.integers(1, 5),
        enlarge=st.integers(1, 3),
    )
    def test_each_image_is_at_its_place(self, n: int, size: tuple[int, int, int], columns: int, enlarge: int) -> None:
        images = some_bytes(n, *size)
        height, width, channels = size
        whole = grid(images, columns, enlarge)
        assert whole.shape == (-(-n // columns) * height * enlarge, columns * width * enlarge, channels)
        small = whole[::enlarge, ::enlarge]
        np.testing.assert_array_equal(whole, np.kron(small, np.ones((enlarge, enlarge, 1), np.uint8)))
        for i in range(n):
            top, left = i // columns * height, i % columns * width
            np.testing.assert_array_equal(small[top : top + height, left : left + width], images[i])

    @pytest.mark.parametrize(
        ("images", "columns", "enlarge", "message"),
        [
            (some_bytes(2, 2, 2, 1), 0, 1, "a grid's columns is 0; expected at least 1"),
            (some_bytes(2, 2, 2, 1), 1, 0, "a grid's enlarge is 0; expected at least 1"),
            (some_bytes(0, 2, 2, 1), 1, 1, "a grid's number of images is 0; expected at least 1"),
            (some_bytes(2, 2, 1), 1, 1, "images are uint8 [2, 2, 1]; expected uint8 [n, H, W, C]"),
            (np.zeros((1, 2, 2, 1), np.float32), 1, 1, "images are float32 [1, 2, 2, 1]; expected uint8"),
        ],
    )
    def test_impossible_grids(self, images: np.ndarray, columns: int, enlarge: int, message: str) -> None:
        with pytest.raises(RequestError) as error:
            grid(images, columns, enlarge)
        assert message in str(error.value)


class TestPng:
    @pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
    def test_round_trip(self, tmp_path: Path, channels: int, mode: str) -> None:
        image = some_bytes(5, 7, channels)
        save_png(tmp_path / "a.png", image)
        with Image.open(tmp_path / "a.png") as read:
            assert read.format == "PNG"
            assert read.mode == mode
            np.testing.assert_array_equal(np.asarray(read).reshape(image.shape), image)
        assert os.listdir(tmp_path) == ["a.png"]

    def test_it_is_a_png_whatever_the_name(self, tmp_path: Path) -> None:
        for name in ("a", "a.jpg"):
            save_png(tmp_path / name, some_bytes(4, 4, 3))
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    def test_strided_images_are_written_as_they_look(self, tmp_path: Path) -> None:
        image = some_bytes(8, 8, 3)[::2, ::-1]
        save_png(tmp_path / "a.png", image)
        with Image.open(tmp_path / "a.png") as read:
            np.testing.assert_array_equal(np.asarray(read), image)

    @pytest.mark.parametrize("channels", [2, 4, 8])
    def test_other_channel_counts(self, tmp_path: Path, channels: int) -> None:
        with pytest.raises(RequestError) as error:
            save_png(tmp_path / "a.png", some_bytes(4, 4, channels))
        assert str(error.value) == (
            f"a PNG cannot hold an image of {channels} channels; expected 1 or 3: save the images as .npz"
        )
        assert os.listdir(tmp_path) == []

    def test_wrong_layout(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match=r"images are uint8 \[4, 4\]; expected uint8 \[H, W, C\]"):
            save_png(tmp_path / "a.png", some_bytes(4, 4))

    @pytest.mark.usefixtures("full_disk")
    def test_full_disk(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError) as error:
            save_png(tmp_path / "a.png", some_bytes(32, 32, 3))
        assert str(error.value).startswith(f"cannot write {tmp_path}/a.png: No space left on device; free")
        assert os.listdir(tmp_path) == []

    def test_unwritable_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match="a.png: Not a directory; one part of the path is a file"):
            save_png(tmp_path / "file" / "a.png", some_bytes(4, 4, 1))
        with pytest.raises(OutputError, match="a.png: No such file or directory; create the folder first"):
            save_png(tmp_path / "missing" / "a.png", some_bytes(4, 4, 1))


class TestSaveImages:
    def test_names_and_contents(self, tmp_path: Path) -> None:
        images = some_bytes(3, 4, 5, 1)
        paths = save_images(tmp_path / "new" / "folder", images)
        assert [path.name for path in paths] == ["000000.png", "000001.png", "000002.png"]
        for path, image in zip(paths, images, strict=True):
            with Image.open(path) as read:
                np.testing.assert_array_equal(np.asarray(read), image[..., 0])

    def test_numbers(self, tmp_path: Path) -> None:
        paths = save_images(tmp_path, some_bytes(3, 4, 4, 3), numbers=[7, 2**64 - 1, 999_999])
        assert [path.name for path in paths] == ["000007.png", "18446744073709551615.png", "999999.png"]
        assert set(os.listdir(tmp_path)) == {path.name for path in paths}

    def test_no_images_make_an_empty_folder(self, tmp_path: Path) -> None:
        assert save_images(tmp_path / "a", some_bytes(0, 4, 4, 1)) == []

    def test_wrong_number_of_numbers(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="2 file numbers for 3 images; expected one for each"):
            save_images(tmp_path / "a", some_bytes(3, 4, 4, 1), numbers=[0, 1])
        assert os.listdir(tmp_path) == []

    @pytest.mark.usefixtures("full_disk")
    def test_full_disk_leaves_no_half_image(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match=r"000000.png: No space left on device"):
            save_images(tmp_path / "a", some_bytes(2, 32, 32, 3))
        assert os.listdir(tmp_path / "a") == []

    def test_folder_under_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match="file/a: Not a directory; one part of the path is a file"):
            save_images(tmp_path / "file" / "a", some_bytes(1, 4, 4, 1))


class TestNpz:
    def test_layout_with_labels(self, tmp_path: Path) -> None:
        images = some_bytes(4, 5, 6, 3)
        save_npz(tmp_path / "samples.npz", images, labels=np.array([3, 1, 4, 1], np.int32))
        assert os.listdir(tmp_path) == ["samples.npz"]
        with np.load(tmp_path / "samples.npz", allow_pickle=False) as read:
            assert read.files == ["arr_0", "arr_1"]
            np.testing.assert_array_equal(read["arr_0"], images)
            assert read["arr_0"].dtype == np.uint8
            assert read["arr_1"].dtype == np.int64
            assert read["arr_1"].tolist() == [3, 1, 4, 1]

    def test_layout_without_labels(self, tmp_path: Path) -> None:
        images = some_bytes(2, 3, 3, 7)
        save_npz(tmp_path / "named_otherwise", images)
        assert os.listdir(tmp_path) == ["named_otherwise"]
        with np.load(tmp_path / "named_otherwise") as read:
            assert read.files == ["arr_0"]
            np.testing.assert_array_equal(read["arr_0"], images)

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ([1, 2], r"labels are int64 \[2\]; expected integers \[3\]"),
            ([[1], [2], [3]], r"labels are int64 \[3, 1\]; expected integers \[3\]"),
            ([0.5, 1.5, 2.5], r"labels are float64 \[3\]; expected integers \[3\]"),
        ],
    )
    def test_impossible_labels(self, tmp_path: Path, labels: list[Any], message: str) -> None:
        with pytest.raises(RequestError, match=message):
            save_npz(tmp_path / "a.npz", some_bytes(3, 2, 2, 1), labels)
        assert os.listdir(tmp_path) == []

    def test_wrong_layout(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match=r"are float32 \[1, 2, 2, 1\]; expected uint8 \[n, H, W, C\]"):
            save_npz(tmp_path / "a.npz", np.zeros((1, 2, 2, 1), np.float32))

    @pytest.mark.usefixtures("full_disk")
    def test_full_disk_leaves_the_old_file(self, tmp_path: Path) -> None:
        descriptor = os.open(tmp_path / "a.npz", os.O_CREAT | os.O_WRONLY)
        os.write(descriptor, b"old")
        os.close(descriptor)
        with pytest.raises(OutputError, match=r"a.npz: No space left on device; free space on this disk"):
            save_npz(tmp_path / "a.npz", some_bytes(2, 32, 32, 3))
        assert os.listdir(tmp_path) == ["a.npz"]
        assert (tmp_path / "a.npz").read_bytes() == b"old"
