"""A bundle calibrated on dark pictures, and statistics of bright ones: what the tests of adapting share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import tvm
from networks import network
from tvm import relax

from qsearch.adapt.replay import Modules
from qsearch.build.cache import KernelCache
from qsearch.build.link import Linker
from qsearch.build.target import open_target
from qsearch.calibrate.observe import observe
from qsearch.calibrate.ranges import activation_ranges
from qsearch.config import QuantConfig
from qsearch.data import Preprocessing
from qsearch.export import monitor, rescale, runner
from qsearch.export.bundle import Adaptable, BundleContent, write_bundle
from qsearch.export.from_study import recorded_inputs
from qsearch.measure.accuracy import run_images
from qsearch.quantize.lower import lower
from qsearch.quantize.weight_store import WeightStore
from qsearch.quantize.whole_pictures import normalised_pixels, with_preprocessing

PREPROCESSING = Preprocessing(None, (12, 10), (0.5,) * 3, (0.25,) * 3)
CLASSES = tuple(f"class{index}" for index in range(7))
DARK = 0.3


def pixels(count: int, brightness: float = 1.0, seed: int = 0) -> np.ndarray:
    """Pictures of smooth noise, uint8 (count, 12, 10, 3)."""
    random = np.random.default_rng(seed)
    coarse = random.uniform(0, 255, (count, 4, 5, 3)).repeat(3, 1).repeat(2, 2)
    return np.rint(brightness * coarse).astype(np.uint8)


def pictures(count: int, brightness: float = 1.0, seed: int = 0) -> np.ndarray:
    """The same as a module takes them, float32 (count, 3, 12, 10)."""
    return runner.normalised(pixels(count, brightness, seed), PREPROCESSING.to_json())


def write_dark_bundle(directory: Path, kernels: Path, precision: str = "int8", takes_pixels: bool = False) -> Path:
    """Export the small network with ranges of dark pictures."""
    model, config = network("residual")[0], QuantConfig(default_precision=precision)
    linker = Linker(KernelCache(kernels, open_target("host")))
    calibration = pictures(128, DARK)
    ranges = activation_ranges(observe(model, calibration, 32), model, config.calibration, PREPROCESSING.value_range)
    program = lower(model, config, ranges, WeightStore())
    recorded, inputs = recorded_inputs(pictures(4, seed=1), PREPROCESSING)
    if takes_pixels:
        program, inputs, calibration = with_preprocessing(program, PREPROCESSING), runner.varied(recorded), pixels(128, DARK)
    outputs = run_images(linker.build(program).open, inputs)
    normalised = normalised_pixels(PREPROCESSING) if takes_pixels else None
    adaptable = Adaptable(model, PREPROCESSING.value_range, calibration, normalised)
    given = (
        config,
        PREPROCESSING.to_json(),
        CLASSES,
        {"latency_ms": 1.0, "search": {"latency": {"ratio": None}}},
        recorded,
        outputs,
        takes_pixels,
    )
    content = BundleContent(*given, adaptable=adaptable)
    write_bundle(directory, linker, program, content)
    return directory


def alone(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a script with TVM's runtime alone."""
    environment = os.environ | {"TVM_USE_RUNTIME_LIB": "1", "PYTHONPATH": ""}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def record(bundle: Path, file: Path, images: np.ndarray) -> Path:
    """Statistics of images as the bundle's own monitor records them, in this process."""
    manifest, found = runner.read_manifest(bundle), rescale.read_record(bundle / rescale.RECORD)
    counter = monitor.Counter(bundle, found, manifest, tvm)
    statistics = monitor.Statistics(manifest["sha256"]["model.so"], len(found["values"]), 256)
    for image in images:
        statistics.add(counter(image[None]), image[None])
    monitor.write_statistics(file, statistics, PREPROCESSING.to_json())
    return file


def run_here(modules: Modules, *arguments: str | Path) -> None:
    """What `Modules` does in another process, in this one, which has loaded TVM already."""
    _, _, given, found, *files = map(Path, arguments)
    images = np.load(given)
    np.save(found, np.stack([outputs_of(file, images) for file in files]))


def outputs_of(module: Path, images: np.ndarray) -> np.ndarray:
    """What a module's file gives for images."""
    # By a name of its own: the loader takes a file of a known name for the one that it has.
    machine = relax.VirtualMachine(monitor.load_bytes(tvm, module.read_bytes()), tvm.cpu())
    return np.concatenate([machine["main"](tvm.runtime.tensor(image[None])).numpy() for image in images])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
