"""Decoding, channels, and the cache of decoded images."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import pytest
from image_folders import GREY, RGB, divided_rows, write_image, write_table
from PIL import Image

from qsearch.data import decode, image_file, load_dataset
from qsearch.errors import DataError


def test_images_are_decoded_once_and_in_order(folders: Path, tmp_path: Path) -> None:
    data = load_dataset(folders, RGB)
    calls: list[tuple[int, int]] = []
    images = data.images("search", tmp_path / "cache", lambda done, total: calls.append((done, total)))
    assert images.shape == (27, 3, 12, 12)
    assert images.dtype == np.float32
    assert not images.flags.writeable
    assert calls == [(done, 27) for done in range(1, 28)]
    for row, path in zip(images, data.paths("search"), strict=True):
        np.testing.assert_array_equal(row, decode(folders / path, RGB))
    calls.clear()
    np.testing.assert_array_equal(data.images("search", tmp_path / "cache", lambda *args: calls.append(args)), images)
    assert calls == []


def test_carved_parts_share_one_file(tmp_path: Path) -> None:
    data = load_dataset(write_table(tmp_path / "set", divided_rows()), RGB)
    cache = tmp_path / "cache"
    half = data.images("search_half", cache)
    np.testing.assert_array_equal(half, np.concatenate([data.images("search", cache), data.images("calibration", cache)]))
    np.testing.assert_array_equal(data.labels("search_half"), np.concatenate([data.labels("search"), data.labels("calibration")]))
    assert len(list(cache.glob("*.npy"))) == 1


def test_edited_image_is_decoded_again(folders: Path, tmp_path: Path) -> None:
    before = np.array(load_dataset(folders, RGB).images("heldout", tmp_path / "cache"))
    changed = folders / load_dataset(folders, RGB).paths("heldout")[0]
    size = changed.stat().st_size
    write_image(changed, seed=99)
    os.truncate(changed, max(size, changed.stat().st_size))  # Padding after a PNG's end is ignored.
    after = load_dataset(folders, RGB).images("heldout", tmp_path / "cache")
    assert not np.array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1:], after[1:])


@pytest.mark.parametrize("damage", ["flipped", "truncated", "no checksum", "another checksum"])
def test_damaged_images_are_decoded_again(folders: Path, tmp_path: Path, damage: str) -> None:
    before = np.array(load_dataset(folders, RGB).images("heldout", tmp_path / "cache"))
    (kept,) = (tmp_path / "cache").glob("*.npy")
    content, checksum = bytearray(kept.read_bytes()), kept.with_suffix(".crc32")
    content[len(content) // 2] ^= 1
    if damage == "no checksum":
        checksum.unlink()
    elif damage == "another checksum":
        checksum.write_text("00000000\n")
    else:
        kept.write_bytes(content if damage == "flipped" else content[:-4])
    # As another process would find it.
    image_file._whole.clear()
    calls: list[tuple[int, int]] = []
    after = load_dataset(folders, RGB).images("heldout", tmp_path / "cache", lambda *counts: calls.append(counts))
    assert calls
    np.testing.assert_array_equal(before, after)


def test_interrupted_decoding_leaves_nothing(folders: Path, tmp_path: Path) -> None:
    def interrupt(done: int, _total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    data = load_dataset(folders, RGB)
    with pytest.raises(KeyboardInterrupt):
        data.images("search", tmp_path / "cache", interrupt)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} <= {".lock"}
    assert len(data.images("search", tmp_path / "cache")) == 27


def test_full_disk_is_one_clear_error(folders: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # A write beyond it fails as on a full disk.
    try:
        with pytest.raises(DataError, match=r"cannot keep the decoded images in .*cache \(File too large\); free space"):
            load_dataset(folders, RGB).images("search", tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} <= {".lock"}


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_colour_images_are_converted_silently(tmp_path: Path, mode: str) -> None:
    path = write_image(tmp_path / ("image.tif" if mode == "CMYK" else "image.png"), mode)
    assert decode(path, RGB).shape == (3, 12, 12)
    with pytest.raises(DataError, match="colour channels, the model wants 1 channel"):
        decode(path, GREY)
    assert decode(path, GREY, convert=True).shape == (1, 8, 8)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "grey palette", "I;16"])
def test_grey_images_need_the_flag_for_a_colour_model(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.png"
    if mode == "grey palette":
        grey = Image.open(write_image(path, "L"))
        grey.convert("P").save(path)
        assert Image.open(path).mode == "P"
    elif mode == "I;16":
        Image.fromarray(np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)).save(path)
    else:
        write_image(path, mode)
    assert decode(path, GREY).shape == (1, 8, 8)
    with pytest.raises(DataError, match=r"image.png has 1 channel .*pass --convert-channels"):
        decode(path, RGB)
    converted = decode(path, RGB, convert=True)
    np.testing.assert_array_equal(converted[0], converted[2])


def test_sixteen_bits_keep_their_high_byte(tmp_path: Path) -> None:
    values = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "image.png")
    np.testing.assert_allclose(decode(tmp_path / "image.png", GREY)[0], (values >> 8) / 255, rtol=1e-6)
