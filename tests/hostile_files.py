"""Whatever bytes a file of a stranger holds, reading it succeeds or raises an error for people: what the fuzzers try.

`TARGETS` has, for every kind of file, a function that reads one and files that are right, to begin with. Files with checksums of
their own are given these anew, as whoever makes a file to do harm would.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from analytic import make_graph
from PIL import Image
from safetensors.torch import save as safetensors

from qsearch.adapt.statistics import read_statistics
from qsearch.adapt.versions import read_bundle
from qsearch.config import QuantConfig, load_config
from qsearch.data import Preprocessing, decode, read_preprocessing
from qsearch.data.box_listing import list_boxes
from qsearch.data.dataset import list_directory
from qsearch.errors import DataError, QSearchError, UnsupportedModelError
from qsearch.export import monitor, runner
from qsearch.export.verify import read_bundle_classes, read_bundle_detection, read_bundle_preprocessing
from qsearch.measure.devices import pack_runner
from qsearch.measure.devices.cost_file import read_cost_file
from qsearch.measure.devices.run_pack import require_own_pack
from qsearch.measure.measurement import Accuracy, Latency, Measurement, Memory
from qsearch.models.archive_check import check_program
from qsearch.models.checkpoint import read_state
from qsearch.search.bound_space import bind_space
from qsearch.search.space import load_space
from qsearch.session.compared import open_compared

__all__ = ["TARGETS", "Target", "try_file"]

ROOT = Path(__file__).parents[1]
GRAPH = make_graph()
LAYERS: dict[str, Any] = {node.name: "conv" for node in GRAPH.nodes if node.op == "conv2d"} | {"classifier": "dense"}
GREY = Preprocessing(None, (4, 4), (0.5,), (0.25,), channels=1)
CLASSES = ("cat", "dog", "eel")
# Parts of a document that is made of several are divided by this.
DIVIDER = b"\xf1PART\xf1"


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        read: Reads a file of these bytes, in a folder that it may write to.
        seeds: Files that are right.
    """

    read: Callable[[bytes, Path], object]
    seeds: Callable[[], list[bytes]]


def try_file(target: Target, data: bytes, folder: Path) -> None:
    """Read a file; errors for people are as good as success."""
    with contextlib.suppress(QSearchError):
        target.read(data, folder)


def _kept(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


# Texts that people write


def read_space(data: bytes, folder: Path) -> None:
    """A search space, bound to a model."""
    bind_space(load_space(_kept(folder, "space.yaml", data)), GRAPH)


def spaces() -> list[bytes]:
    """The presets, and what YAML can do besides."""
    odd = b"version: 1\nprecisions: &a {default: [int8, fp32]}\nrules: [{types: [conv], precisions: [int8]}]\n"
    odd += b"skip: [*a, 2001-01-01, 1:2:3, !!binary aa]\nstart: {<<: {precision: int8}}\n"
    return [path.read_bytes() for path in sorted((ROOT / "spaces").glob("*.yaml"))] + [odd]


def read_configuration(data: bytes, folder: Path) -> None:
    """A configuration, resolved for a model's layers."""
    load_config(_kept(folder, "config.json", data)).resolve(LAYERS)


def configurations() -> list[bytes]:
    """Configurations with and without rules."""
    rules = [
        {"types": ["conv"], "calibration": {"mode": "percentile", "percentile": 99.9}},
        {"position": [0, -1], "precision": "int16"},
    ]
    named = {"precision": {"classifier": "fp32"}, "skip": ["features.*"], "rules": rules, "migration": 0.5}
    return [json.dumps(QuantConfig().to_json()).encode(), json.dumps(named).encode()]


def read_image_steps(data: bytes, folder: Path) -> None:
    """A preprocessing, applied where that is little work."""
    found = read_preprocessing(_kept(folder, "preprocessing.json", data))
    assert found.value_range[0] < found.value_range[1]
    if max(found.crop) < 256 and (found.resize or 0) < 256:
        found.apply(Image.new("RGB", (40, 30)))


def image_steps() -> list[bytes]:
    """Of grey and of colour images."""
    return [
        json.dumps(Preprocessing(20, (16, 12), (0.5,) * 3, (0.25,) * 3).to_json()).encode(),
        json.dumps(GREY.to_json()).encode(),
    ]


def _pictures(folder: Path) -> None:
    for name in ("a.png", "b.png"):
        if not (folder / name).exists():
            Image.new("L", (40, 20)).save(folder / name)


def read_labels(data: bytes, folder: Path) -> None:
    """A table of labels: for a model with names, with a number of classes, and with neither."""
    _pictures(folder)
    _kept(folder, "labels.csv", data)
    for classes in (CLASSES, 10, None):
        with contextlib.suppress(DataError):
            list_directory(folder, classes)


def labels() -> list[bytes]:
    """By name and by number."""
    return [
        b"path,label,split\na.png,cat,search\nb.png,dog,heldout\n",
        b'label,path\n1,"a.png"\n0,./b.png\n',
        b"path,label\n../x,1\n",
    ]


def read_boxes(data: bytes, folder: Path) -> None:
    """A table of boxes."""
    _pictures(folder)
    table = _kept(folder, "boxes.csv", data)
    for classes in (CLASSES, 10, None):
        with contextlib.suppress(DataError):
            list_boxes(table, classes)


def boxes() -> list[bytes]:
    """Images with boxes, and one without."""
    return [b"path,label,x1,y1,x2,y2,split\na.png,cat,0,0,10,10,search\na.png,dog,1,2,3,4.5,search\nb.png,,,,,,heldout\n"]


def read_costs(data: bytes, folder: Path) -> None:
    """Times of kernels."""
    found = read_cost_file(_kept(folder, "table.json", data))
    found.tiles()
    assert all(found.seconds(symbol) is None or found.seconds(symbol) >= 0 for symbol in found.kernels)


def costs() -> list[bytes]:
    """A table of two kernels."""
    kernel = {"what": "w", "operation": "o", "exact": True, "seconds": 1e-3, "spread": 1e-6, "tile_group": "g"}
    kernels = {"qs_a": kernel | {"tile": {"rows": 4, "lanes": [1, 2]}}, "qs_b": kernel | {"tile": None, "exact": False}}
    document = {"schema": 1, "device": "d", "model": "m", "made_by": {"qsearch": "0"}, "kernels": kernels}
    document |= {
        "target": {"name": "n", "description": "d", "threads": 1},
        "call": {"overhead_seconds": 1e-6},
        "inference_seconds": 0.0,
    }
    return [json.dumps(document).encode()]


# Bundles and packs

MEASURED = Measurement(Latency(1.0, 0.1, 21, 5), Memory(5, 4, 1), Accuracy(50.0, 90.0, 0.1, (0.0, 0.2), 10, "0")).to_json()
DOCUMENTS: dict[str, Any] = {
    "classes.json": ["cat", "dog"],
    "config.json": {"default_precision": "int8"},
    "detection.json": {"strides": [8]},
    "preprocessing.json": GREY.to_json(),
    "metrics.json": {
        "trial": 3,
        "search": MEASURED,
        "float": MEASURED,
        "layers": [{"name": "a", "type": "conv", "weights": 10}],
        "identity": {"model": "m"},
    },
}
MANIFEST = {
    "format": runner.FORMAT,
    "input": {"dtype": "float32", "layout": "NCHW", "shape": [1, 1, 4, 4]},
    "target": {"threads": 1, "cpu_flags": [], "description": "this"},
    "metrics": {"latency_ms": 1.0},
    "version": 1,
    "sha256": {"model.so": hashlib.sha256(b"code").hexdigest()},
}


def _bundle(folder: Path) -> Path:
    bundle = folder / "bundle"
    if not bundle.exists():
        bundle.mkdir()
        (bundle / "model.so").write_bytes(b"code")
    return bundle


def _signed(manifest: Any) -> bytes:
    if isinstance(manifest, dict):
        with contextlib.suppress(RecursionError):
            manifest["self_sha256"] = runner.own_digest(manifest)
    return json.dumps(manifest).encode()


def read_manifest(data: bytes, folder: Path) -> None:
    """A bundle's manifest, as it is and made to agree with itself."""
    bundle = _bundle(folder)
    _kept(bundle, "manifest.json", data)
    with contextlib.suppress(QSearchError):
        read_bundle(bundle, trust=True)
    with contextlib.suppress(ValueError, RecursionError):
        _kept(bundle, "manifest.json", _signed(json.loads(data)))
        read_bundle(bundle)


def read_documents(data: bytes, folder: Path) -> None:
    """The other documents of a bundle, one after the other in one file."""
    bundle = _bundle(folder)
    for name, text in zip(sorted(DOCUMENTS), data.split(DIVIDER), strict=False):
        _kept(bundle, name, text)
    listed = {name: hashlib.sha256((bundle / name).read_bytes()).hexdigest() for name in DOCUMENTS if (bundle / name).exists()}
    _kept(bundle, "manifest.json", _signed(MANIFEST | {"sha256": MANIFEST["sha256"] | listed}))  # type: ignore[operator]
    for read in (read_bundle_classes, read_bundle_detection, read_bundle_preprocessing, lambda path: open_compared(str(path))):
        with contextlib.suppress(QSearchError):
            read(bundle)


def documents() -> list[bytes]:
    """All that are right."""
    return [DIVIDER.join(json.dumps(DOCUMENTS[name]).encode() for name in sorted(DOCUMENTS))]


def read_pack(data: bytes, folder: Path) -> None:
    """A pack, as it is."""
    require_own_pack(_kept(folder, "kernels.pack", data), trust=False)


def read_pack_manifest(data: bytes, folder: Path) -> None:
    """A pack of this manifest, made to agree with itself."""
    with zipfile.ZipFile(folder / "kernels.pack", "w") as archive:
        archive.writestr("kernels/kernels.so", b"code")
        with contextlib.suppress(ValueError, RecursionError):
            manifest = json.loads(data)
            if isinstance(manifest, dict):
                manifest["self_sha256"] = pack_runner.own_digest(manifest)
            data = json.dumps(manifest).encode()
        archive.writestr("manifest.json", data)
    require_own_pack(folder / "kernels.pack", trust=False)


def pack_manifests() -> list[bytes]:
    """One that lists what is there."""
    return [
        json.dumps({"schema": 1, "sha256": {"kernels/kernels.so": hashlib.sha256(b"code").hexdigest()}, "kernels": []}).encode()
    ]


def packs() -> list[bytes]:
    """Packed as they are, and deflated."""
    found = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", method) as archive:
            archive.writestr("kernels/kernels.so", b"code")
            manifest = json.loads(pack_manifests()[0])
            manifest["self_sha256"] = pack_runner.own_digest(manifest)
            archive.writestr("manifest.json", json.dumps(manifest))
            archive.comment = b"0" * 64
        found.append(stream.getvalue())
    return found


# Statistics, images, weights, programs


def read_recorded(data: bytes, folder: Path) -> None:
    """Statistics, as they are."""
    read_statistics(_kept(folder, "stats.npz", data), folder, MANIFEST, 2)


def read_recorded_parts(data: bytes, folder: Path) -> None:
    """Statistics of this header, these counts and these images, whose digest is right."""
    header, counts, kept = (data.split(DIVIDER) + [b"", b""])[:3]
    with contextlib.suppress(Exception):
        arrays = [np.load(io.BytesIO(one), allow_pickle=False) for one in (counts, kept)]
        found = json.loads(header)
        header = json.dumps(found | {"digest": monitor.digest(*arrays)}).encode()
    with zipfile.ZipFile(folder / "stats.npz", "w") as archive:
        stream = io.BytesIO()
        np.save(stream, np.frombuffer(header, np.uint8))
        for name, content in {"header": stream.getvalue(), "counts": counts, "kept": kept}.items():
            archive.writestr(f"{name}.npy", content)
    read_statistics(folder / "stats.npz", folder, MANIFEST, 2)


def _statistics() -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    counts, kept = np.ones((2, monitor.LEVELS), np.int64), np.zeros((3, 1, 4, 4), np.float32)
    header = {"format": monitor.FORMAT, "version": monitor.VERSION, "module": MANIFEST["sha256"]["model.so"]}  # type: ignore[index]
    return header | {"images": 3, "batches": 3, "digest": monitor.digest(counts, kept)}, counts, kept


def statistics() -> list[bytes]:
    """What a monitor writes."""
    header, counts, kept = _statistics()
    found = []
    for save in (np.savez, np.savez_compressed):
        stream = io.BytesIO()
        save(stream, header=np.frombuffer(json.dumps(header).encode(), np.uint8), counts=counts, kept=kept)
        found.append(stream.getvalue())
    return found


def statistics_parts() -> list[bytes]:
    """The same in parts."""
    header, *arrays = _statistics()
    parts = [json.dumps(header).encode()]
    for array in arrays:
        stream = io.BytesIO()
        np.save(stream, array)
        parts.append(stream.getvalue())
    return [DIVIDER.join(parts)]


def read_image(data: bytes, folder: Path) -> None:
    """A picture."""
    decode(_kept(folder, "image", data), GREY, convert=True)


def images() -> list[bytes]:
    """In every format that is read, and some modes of each."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 8, 3), np.uint8))
    kinds = [("PNG", mode) for mode in ("RGB", "L", "P", "1", "RGBA", "I;16")] + [("GIF", "P"), ("BMP", "RGB"), ("PPM", "L")]
    kinds += [("JPEG", "RGB"), ("JPEG", "CMYK"), ("TIFF", "RGB"), ("TIFF", "L"), ("WEBP", "RGB")]
    found = []
    for kind, mode in kinds:
        stream, options = io.BytesIO(), {"TIFF": {"compression": "tiff_lzw"}, "JPEG": {"progressive": mode == "CMYK"}}
        # Pillow knows no way from colour to 16 bits but by 32.
        image = noise.convert("L").convert("I").convert("I;16") if mode == "I;16" else noise.convert(mode)
        image.save(stream, kind, **options.get(kind, {}))
        found.append(stream.getvalue())
    return found


def read_weights(data: bytes, folder: Path) -> None:
    """A checkpoint, by either name."""
    for name in ("weights.pth", "weights.safetensors"):
        with contextlib.suppress(UnsupportedModelError):
            read_state(_kept(folder, name, data))


def weights() -> list[bytes]:
    """In either format, and in torch's older one."""
    state, found = {"a": torch.zeros(3, 2), "b": torch.ones(1, dtype=torch.int64)}, []
    for new in (True, False):
        stream = io.BytesIO()
        torch.save(state, stream, _use_new_zipfile_serialization=new)
        found.append(stream.getvalue())
    return [*found, safetensors(state)]


def read_program(data: bytes, folder: Path) -> None:
    """The document of a program; what is admitted is looked at once more, by a rule that is simpler and stricter."""
    try:
        check_program(data)
    except (ValueError, KeyError, TypeError, AttributeError):
        # All of which the reader of archives tells as one error.
        return
    for text in _texts(json.loads(data)):
        assert not any(harm in text for harm in ("__", "import", "lambda", "os.", "eval(", "exec(")), text


def _texts(value: Any) -> list[str]:
    """Every text in what torch evaluates: formulas, operators, names."""
    if isinstance(value, list):
        return [text for one in value for text in _texts(one)]
    if not isinstance(value, dict):
        return []
    own = [
        value[name] for name in ("expr_str", "target", "as_operator", "in_spec", "out_spec") if isinstance(value.get(name), str)
    ]
    return own + [text for name, one in value.items() if name != "metadata" for text in _texts(one)]


def programs() -> list[bytes]:
    """The document of a small network's program whose batch may vary, its metadata left out."""
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2)).eval()
    program = torch.export.export(network, (torch.zeros(2, 1, 4, 4),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    stream = io.BytesIO()
    torch.export.save(program, stream)
    with zipfile.ZipFile(stream) as archive:
        document = json.loads(archive.read(next(name for name in archive.namelist() if name.endswith("models/model.json"))))
    for node in document["graph_module"]["graph"]["nodes"]:
        node["metadata"] = {}
    return [json.dumps(document).encode()]


TARGETS = {
    "spaces": Target(read_space, spaces),
    "configurations": Target(read_configuration, configurations),
    "preprocessing": Target(read_image_steps, image_steps),
    "labels": Target(read_labels, labels),
    "boxes": Target(read_boxes, boxes),
    "cost tables": Target(read_costs, costs),
    "manifests": Target(read_manifest, lambda: [_signed(dict(MANIFEST))]),
    "bundle documents": Target(read_documents, documents),
    "packs": Target(read_pack, packs),
    "pack manifests": Target(read_pack_manifest, pack_manifests),
    "statistics": Target(read_recorded, statistics),
    "statistics in parts": Target(read_recorded_parts, statistics_parts),
    "images": Target(read_image, images),
    "weights": Target(read_weights, weights),
    "programs": Target(read_program, programs),
}
# Nothing that is read here may be sealed by a real key.
os.environ.setdefault("XDG_STATE_HOME", "/nonexistent")
