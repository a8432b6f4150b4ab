"""Write a bundle: one compiled configuration with everything needed to run and to check it.

The module is linked from the kernels that were measured, or measured again; the outputs on the search images must
have the digest that was recorded, or nothing is written (see `from_study`). A bundle appears whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tvm.support import cc

from qsearch.build.cache import LEAST_FREE_BYTES
from qsearch.build.link import CompiledModule, Linker
from qsearch.build.object_cache import compiler_for
from qsearch.build.target import Target
from qsearch.config import QuantConfig
from qsearch.errors import BundleError, ToolchainError
from qsearch.export import monitor, predict, rescale, runner
from qsearch.export.bundle_seal import seal_bundle
from qsearch.export.marked_constants import mark_constants
from qsearch.export.reference_counts import with_reference
from qsearch.export.scales_record import describe_scales
from qsearch.models.graph import Model
from qsearch.quantize.program import Program
from qsearch.search.provenance import package_versions
from qsearch.whole_files import make_folder, put_in_place, remove_strays, scratch_name

__all__ = ["Adaptable", "BundleContent", "require_vacant", "write_bundle"]

# Of modules for the CPU: others have no runner of their own.
CPP_RUNNER = Path(__file__).with_name("run.cpp")
PACKAGES = ("apache-tvm", "apache-tvm-ffi", "numpy", "torch")

README = """# A qsearch bundle

`model.so` is a compiled, quantized model for {target}.

It takes {input}.
It gives {output}.
It needs Python with NumPy and apache-tvm {tvm} (its runtime is enough).

    python run.py .                  check the files, replay the recorded outputs bit for bit, time the module
{predict}
{monitor}{cpp}
| file | what it is |
|---|---|
| model.so | kernels, weights and the Relax executable |
| config.json | the quantization configuration |
| preprocessing.json, classes.json | from picture to input, from logit to name |
| metrics.json | what was measured of this very module |
| recorded_inputs.npy | pixels of pictures; replayed as they are, mirrored, upside down and inverted |
| recorded_outputs.npy | the outputs that the module must give for them |
{scales}| manifest.json | target, versions, SHA-256 of every file |
| seal | by which the qsearch that made this knows it again; others run it with `--trust` |
"""
SCALES = "| scales.npz | scales and zero points, where they lie in model.so, and what tensors held on calibration images |\n"
MONITOR = "    python monitor.py STATS.npz PICTURE...   what tensors hold on pictures, for `qsearch adapt`; see its first lines\n"
INPUT = "float32 images ({shape}), preprocessed as `preprocessing.json` says"
PIXELS_INPUT = "pixels, uint8 ({shape}), resized and cropped as `preprocessing.json` says and no more: normalisation is inside"
PREDICT = "    python predict.py PICTURE...     classify pictures (with Pillow), or images of shape {shape} in a .npy file"
CPP = """
`run.cpp` does the same without Python; its first lines say how to build it.
"""
DETECTOR_OUTPUT = "a box and logits at every position of a grid, read as `detection.json` says"
DETECTOR_PREDICT = "    python run.py . outputs X.npy Y.npy    the outputs for float32 images of shape {shape}"


@dataclass(frozen=True, eq=False)
class Adaptable:
    """What a bundle needs so that its scales can be replaced later.

    Attributes:
        model: What the program was lowered from.
        input_range: (low, high) that preprocessed images can have.
        images: Calibration images, as the module takes them.
        normalised: What pixels are, by `normalised_pixels`, of a module that takes these.
    """

    model: Model
    input_range: tuple[float, float]
    images: np.ndarray
    normalised: np.ndarray | None = None


@dataclass(frozen=True)
class BundleContent:
    """What goes into a bundle besides the module.

    Attributes:
        config: The configuration.
        preprocessing: Its JSON form.
        classes: Class names in output order; may be shorter than the output.
        metrics: What was measured, with `latency_ms` at the top level, and `remark` where there is something to say of it.
        inputs: Recorded pictures, uint8 (N, H, W, C), each of which `runner.varied` makes eight inputs of; or inputs, float32
            (N, C, H, W).
        outputs: What the measured module gave for the inputs, float32 (inputs, ...).
        takes_pixels: Normalisation is inside the module, and the choice of the class; outputs are then int32 (inputs,).
        detection: JSON form of how a detector's output is read; None for a classifier.
        adaptable: For a module whose scales can be replaced later; None for those of GPUs and of machines that are not here.
    """

    config: QuantConfig
    preprocessing: dict[str, Any]
    classes: tuple[str, ...]
    metrics: dict[str, Any]
    inputs: np.ndarray
    outputs: np.ndarray
    takes_pixels: bool = False
    detection: dict[str, Any] | None = None
    adaptable: Adaptable | None = None


def write_bundle(directory: Path, linker: Linker, program: Program, content: BundleContent) -> None:
    """Write a bundle.

    Args:
        directory: Where; must not exist, or be an empty directory.
        linker: Builds the program.
        program: What to export.
        content: The rest.

    Raises:
        BundleError: The directory is taken or cannot be written.
        BuildError: The module does not link.
    """
    require_vacant(directory)
    directory = directory.absolute()
    scratch = scratch_name(directory)
    try:
        make_folder(directory.parent)
        remove_strays(directory)
        scratch.mkdir()
        _fill(scratch, linker, program, content)
        put_in_place(scratch, directory)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "free some space or choose another --out" if full else "choose another --out"
        raise BundleError(f"cannot write bundle {directory}: {error.strerror or error}; {way_out}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def require_vacant(directory: Path) -> None:
    """Refuse to write where something is.

    Raises:
        BundleError: The directory is taken, or lies in a bundle.
    """
    try:
        taken = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
        inside = next((parent for parent in directory.absolute().parents if (parent / "manifest.json").exists()), None)
    except OSError as error:
        raise BundleError(f"cannot write bundle {directory}: {error.strerror}; choose another --out") from error
    if taken:
        raise BundleError(f"{directory} exists and is not an empty directory; choose another --out")
    if inside is not None:
        raise BundleError(f"{directory} lies inside the bundle {inside}; choose another --out")


def _fill(directory: Path, linker: Linker, program: Program, content: BundleContent) -> None:
    _write_module(directory, linker, program, content.adaptable)
    _write_json(directory / "config.json", content.config.to_json())
    _write_json(directory / "preprocessing.json", content.preprocessing)
    _write_json(directory / "classes.json", list(content.classes))
    _write_json(directory / "metrics.json", content.metrics)
    if content.detection is not None:
        _write_json(directory / runner.DETECTION, content.detection)
    np.save(directory / "recorded_inputs.npy", np.ascontiguousarray(content.inputs), allow_pickle=False)
    np.save(directory / "recorded_outputs.npy", np.ascontiguousarray(content.outputs), allow_pickle=False)
    shutil.copyfile(runner.__file__, directory / "run.py")
    if content.detection is None:
        shutil.copyfile(predict.__file__, directory / "predict.py")
    cpp = not linker.target.arch
    if cpp:
        shutil.copyfile(CPP_RUNNER, directory / CPP_RUNNER.name)
    versions = package_versions(PACKAGES)
    shape = ", ".join(["N", *map(str, program.input.shape[1:])])
    output, how = ("logits", PREDICT) if content.detection is None else (DETECTOR_OUTPUT, DETECTOR_PREDICT)
    output = "the index of the class, int32" if content.takes_pixels else output
    given = (PIXELS_INPUT if content.takes_pixels else INPUT).format(shape=shape)
    words = {"output": output, "predict": how.format(shape=shape), "tvm": versions.get("apache-tvm", "")}
    words["cpp"] = CPP if cpp else ""
    words |= {"monitor": MONITOR, "scales": SCALES} if content.adaptable else {"monitor": "", "scales": ""}
    text = README.format(target=linker.target.description, input=given, shape=shape, **words)
    (directory / "README.md").write_text(text, encoding="utf-8")
    layout = "NHWC" if content.takes_pixels else "NCHW"
    of_input = {"dtype": program.input.dtype, "layout": layout, "shape": list(program.input.shape)}
    _write_manifest(directory, linker.target, versions, {"input": of_input, "metrics": content.metrics})
    seal_bundle(directory)


def _write_module(directory: Path, linker: Linker, program: Program, adaptable: Adaptable | None) -> None:
    """The module; with the record of its scales where they can be replaced later."""
    path = directory / "model.so"
    if adaptable is None:
        _export_library(linker.build(program, linked=False, exported=True), path, linker.target)
        return
    described = describe_scales(program, adaptable.model, adaptable.input_range, adaptable.normalised)
    marked = mark_constants(described, linker.calls(program.ops))
    _export_library(linker.build(program, linked=False, exported=True, calls=marked.calls), path, linker.target)
    record, content = marked.located(path.read_bytes())
    path.write_bytes(content)
    facts = {"input": {"shape": list(program.input.shape)}, "target": {"arch": linker.target.arch}}
    rescale.write_record(directory / rescale.RECORD, with_reference(directory, record, facts, adaptable.images))
    for file in (Path(rescale.__file__), Path(monitor.__file__)):
        shutil.copyfile(file, directory / file.name)


def _export_library(module: CompiledModule, path: Path, target: Target) -> None:
    """One shared library: the executable, its constants, and the kernels' own object files."""
    if not cc.get_cc():
        raise ToolchainError("no C++ compiler found to link the bundle with: install g++ or clang++, or set CXX to one")
    compiler = compiler_for(target)
    try:
        # Without what debuggers read of kernels, which is a tenth of the file.
        module.executable.export_library(str(path), addons=module.addons, cc=compiler, options=["-Wl,--strip-all"])
    except RuntimeError as error:
        if shutil.disk_usage(path.parent).free < LEAST_FREE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        # The first line of the linker's own words; after it comes its whole command.
        lines = [line for line in str(error).splitlines() if "error" in line.lower() and "Command line" not in line]
        reason = (lines or str(error).strip().splitlines() or ["unknown"])[-1][:300]
        raise BundleError(f"linking {path.name} failed: {reason}; run the command again") from error


def _write_manifest(directory: Path, target: Target, versions: dict[str, str], told: dict[str, Any]) -> None:
    metrics = told["metrics"]
    files = sorted(path for path in directory.iterdir() if path.is_file())
    manifest: dict[str, Any] = {
        "format": runner.FORMAT,
        "versions": versions,
        "input": told["input"],
        "target": {
            "name": target.name,
            "architecture": target.architecture,
            "mcpu": target.mcpu,
            "isa": target.isa.name,
            "device": target.device,
            "arch": target.arch,
            "threads": target.threads,
            "description": target.description,
            "cpu_flags": target.cpu_flags,
        },
        "metrics": {name: metrics[name] for name in ("latency_ms", "remark") if name in metrics},
        "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }
    manifest["self_sha256"] = runner.own_digest(manifest)
    _write_json(directory / "manifest.json", manifest)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
