"""The monitor: outputs as the plain module's, statistics of a bounded part of the time, a file that is whole or refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from adapt_bundles import DARK, PREPROCESSING, alone, pictures, pixels, record
from PIL import Image

from qsearch.export import monitor

SERVING = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import monitor, run
served = monitor.Monitor(sys.argv[1], share=0.2, keep=5)
images = np.load(sys.argv[2])
outputs = np.concatenate([served(images[i % len(images)][None]) for i in range(3000)])[:len(images)]
served.save(sys.argv[3])
manifest = run.read_manifest(served.bundle)
plain = run.run_images(served.machine, manifest, served.tvm, images)
assert np.array_equal(outputs, plain)
print(served.statistics.images, served.sampled / served.spent, len(served.statistics.kept), "tvm.tirx" in sys.modules)
"""


def test_a_program_of_ones_own(dark_bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", pictures(20))
    done = alone("-c", SERVING, dark_bundle, tmp_path / "x.npy", tmp_path / "stats.npz")
    assert done.returncode == 0, done.stderr
    images, share, kept, _ = done.stdout.split()
    assert int(images) > 0 and int(kept) == min(5, int(images))
    # The budget is never exceeded by more than what one call costs beyond the mean.
    assert float(share) < 0.25
    with np.load(tmp_path / "stats.npz") as archive:
        assert json.loads(archive["header"].tobytes())["images"] == int(images)
        assert archive["kept"].dtype == np.uint8
        assert archive["counts"].sum() > 0


def test_folders_and_pictures_count_as_arrays_do(dark_bundle: Path, tmp_path: Path) -> None:
    for index, image in enumerate(pixels(4)):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    np.save(tmp_path / "more.npy", pictures(2, seed=1))
    done = alone(dark_bundle / "monitor.py", tmp_path / "folder.npz", tmp_path, tmp_path / "more.npy")
    assert done.returncode == 0 and json.loads(done.stdout)["images"] == 6
    record(dark_bundle, tmp_path / "array.npz", np.concatenate([pictures(4), pictures(2, seed=1)]))
    with np.load(tmp_path / "folder.npz") as first, np.load(tmp_path / "array.npz") as second:
        assert np.array_equal(first["counts"], second["counts"])
        assert np.array_equal(first["kept"], np.concatenate([pixels(4), pixels(2, seed=1)]))


def test_what_cannot_be_recorded(dark_bundle: Path, tmp_path: Path) -> None:
    done = alone(dark_bundle / "monitor.py", tmp_path / "x.npz", tmp_path / "none.png")
    assert done.returncode == 1 and done.stderr.startswith("problem: ") and not (tmp_path / "x.npz").exists()
    np.save(tmp_path / "bytes.npy", pixels(2))
    done = alone(dark_bundle / "monitor.py", tmp_path / "x.npz", tmp_path / "bytes.npy")
    assert done.returncode == 1 and "holds uint8 (2, 12, 10, 3); expected float32 (N, 3, 12, 10)" in done.stderr
    assert monitor.main([]) == 2


def test_the_budget_decides_which_calls_are_counted() -> None:
    """With a clock of its own: a call takes one second, statistics take ten."""
    now = [0.0]
    served = monitor.Monitor.__new__(monitor.Monitor)

    def call(given):
        now[0] += 1.0
        return given

    class Tensor:
        numpy = staticmethod(lambda: np.zeros((1, 2)))

    def counter(images):
        now[0] += 10.0
        return np.ones((1, 256), np.int64)

    served.device, served.main, served.counter, served.clock = None, call, counter, lambda: now[0]
    served.tvm = type("tvm", (), {"runtime": type("r", (), {"tensor": staticmethod(lambda image, device: Tensor())})})
    served.statistics, served.share = monitor.Statistics("", 1, 3), 0.05
    served.random, served.cost, served.spent, served.sampled, served.calls = np.random.default_rng(0), 10.0, 0.0, 0.0, 0
    for _ in range(2000):
        served(np.zeros((1, 1, 1, 1), np.float32))
        assert served.sampled <= 0.05 * served.spent
    assert 8 <= served.statistics.images <= 10
    assert served.statistics.counts.sum() == 256 * served.statistics.images


def test_every_image_has_the_same_chance_to_be_kept() -> None:
    seen = np.zeros(20)
    for seed in range(400):
        statistics = monitor.Statistics("", 1, 5, seed)
        for number in range(20):
            statistics.add(np.zeros((1, 256), np.int64), np.full((1, 1, 1, 1), number, np.float32))
        seen[[int(image.ravel()[0]) for image in statistics.kept]] += 1
    assert (np.abs(seen / 400 - 0.25) < 0.09).all()


def test_images_that_are_no_pixels_are_kept_as_they_are() -> None:
    settings = PREPROCESSING.to_json()
    assert monitor.as_pixels(pictures(2), settings).dtype == np.uint8
    odd = pictures(2, DARK) + np.float32(1e-3)
    assert monitor.as_pixels(odd, settings) is odd
