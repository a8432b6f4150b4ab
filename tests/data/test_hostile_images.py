"""Images and tables that somebody made to do harm are refused by name, soon and in little memory."""

from __future__ import annotations

import io
import os
import struct
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from image_folders import GREY, RGB, write_image, write_table
from PIL import Image

from qsearch.data import decode, load_dataset
from qsearch.data.box_listing import load_box_dataset
from qsearch.data.dataset import list_directory
from qsearch.data.decode import count_scans
from qsearch.data.labels import map_labels
from qsearch.errors import DataError


def png(width: int, height: int) -> bytes:
    """A file whose header promises so many pixels, and that holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_000, 10_000), (65_535, 65_535), (2**31 - 1, 2**31 - 1)])
def test_too_many_pixels(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "bomb.png").write_bytes(png(*size))
    with pytest.raises(DataError, match=r"bomb.png is not a readable image"):
        decode(tmp_path / "bomb.png", GREY)


def test_a_line_that_resizing_makes_a_bomb_of(tmp_path: Path) -> None:
    Image.new("RGB", (1, 60_000)).save(tmp_path / "line.png")
    with pytest.raises(DataError, match=r"line.png: the image has 1x60000 pixels, and 160x9600000 after .* at most"):
        decode(tmp_path / "line.png", replace(RGB, resize=160))


def progressive() -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(stream, "JPEG", progressive=True, quality=95)
    return stream.getvalue()


def test_scans_are_counted(tmp_path: Path) -> None:
    data = progressive()
    assert 5 < count_scans(data) < 20
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + len(data)) + data
    assert count_scans(data[:2] + thumbnail + data[2:]) == count_scans(data)
    (tmp_path / "good.jpg").write_bytes(data)
    assert decode(tmp_path / "good.jpg", RGB).shape == (3, 12, 12)
    last = data.rindex(b"\xff\xda")
    (tmp_path / "slow.jpg").write_bytes(data[:last] + (data[last:-2]) * 200 + data[-2:])
    with pytest.raises(DataError, match="more than 100 scans"):
        decode(tmp_path / "slow.jpg", RGB)


def test_what_pillow_would_hand_to_another_program(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nquit\n%%EOF\n")
    with pytest.raises(DataError, match="not a readable image"):
        decode(tmp_path / "a.png", GREY)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", "."):
        with pytest.raises(DataError, match="no regular file"):
            decode(tmp_path / name, GREY)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../secret.png", "a" * 5000 + ".png"])
def test_tables_name_what_lies_in_their_folders(tmp_path: Path, name: str) -> None:
    write_image(tmp_path / "secret.png")
    root = tmp_path / "data" / "inner"
    root.mkdir(parents=True)
    write_table(root, [{"path": "a.png", "label": "0"}])
    (root / "labels.csv").write_text(f"path,label\na.png,0\n{name},1\n")
    (root / "boxes.csv").write_text(f"path,label,x1,y1,x2,y2\n{name},0,1,1,2,2\n")
    for load in (load_dataset, load_box_dataset):
        with pytest.raises(DataError, match="leads out of|correct the path"):
            load(root, RGB)


def test_links_in_a_users_own_folder_are_followed(tmp_path: Path) -> None:
    write_image(tmp_path / "elsewhere.png", seed=1)
    root = tmp_path / "data"
    write_table(root, [{"path": "a.png", "label": "0"}])
    (root / "b.png").symlink_to(tmp_path / "elsewhere.png")
    (root / "labels.csv").write_text("path,label\na.png,0\nb.png,1\n")
    assert list_directory(root, None).open(1).size == (20, 16)


@pytest.mark.parametrize("label", ["999999999999", "9" * 5000, "-1", str(1 << 20)])
def test_a_class_index_makes_no_million_classes(label: str) -> None:
    start = time.monotonic()
    with pytest.raises(DataError, match="out of range; expected 0 to"):
        map_labels(["0", label], None, ["line 2", "line 3"])
    assert time.monotonic() - start < 5


def test_tables_with_huge_fields(tmp_path: Path) -> None:
    write_table(tmp_path / "data", [{"path": "a.png", "label": "0"}])
    for text in ("path,label\na.png," + "x" * 200_000, "x" * 200_000, "path,label\n" + "a" * 100_000 + ",1\nb,2\n"):
        (tmp_path / "data" / "labels.csv").write_text(text)
        with pytest.raises(DataError) as caught:
            load_dataset(tmp_path / "data", RGB)
        assert len(str(caught.value)) < 2000
