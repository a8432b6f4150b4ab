"""Run a bundle's module and record, of a few of its calls, what its tensors hold: NumPy and TVM's runtime are all it takes.

This file is copied into bundles, where it needs `run.py` and `rescale.py` beside it.

    monitor = Monitor("BUNDLE")                     in a program of one's own
    logits = monitor(images)                        one batch, as the module takes it
    monitor.save("stats.npz")                       for `qsearch adapt BUNDLE --stats stats.npz`

    python monitor.py STATS.npz X.npy               record statistics of all images in a .npy file
    python monitor.py STATS.npz PICTURE...          or of pictures, or of folders of them (with Pillow)

Of a few calls the images go through a second module as well, whose ranges reach further, so that what the first one clips
is seen, and the integers of its tensors are counted. How many calls these are follows from `share`, the part of the time
that statistics may take; a second copy of the weights is in memory. Not for several threads at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

if __package__:
    from qsearch.export import rescale
    from qsearch.export import runner as run
else:
    import rescale  # type: ignore[no-redef]

    try:
        import run  # type: ignore[no-redef]
    except ImportError:  # in qsearch's own folder it has another name
        import runner as run  # type: ignore[no-redef]

FORMAT, VERSION = "qsearch-statistics-of-calls", 1
LEVELS = 256
# Elements of a tensor that are counted in one call, about.
COUNTED = 4096
# One call in so many is timed, and stands for all: reading the clock is a hundredth of the time of a small module.
TIMED = 16
PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


class Monitor:
    """A bundle's module that records statistics of a part of its calls.

    Args:
        bundle: The bundle.
        share: Part of the time that statistics may take themselves; what they push out of caches comes to about half as much.
        keep: Images to keep, of those that statistics were recorded of; new scales are tried on them. Zero keeps none.
        seed: Of the choice of calls and images.
    """

    def __init__(self, bundle, share=0.01, keep=256, seed=0):
        self.bundle, self.share, self.keep = Path(bundle), share, keep
        self.manifest = run.read_manifest(self.bundle)
        run.check_machine(self.manifest)
        self.machine, self.tvm = run.open_module(self.bundle, self.manifest)
        self.main = self.machine["main"]
        self.device = run.device_of(self.manifest, self.tvm)
        # Of one thread its own time: what else has the processor meanwhile does not count.
        self.clock = time.thread_time if self.manifest["target"]["threads"] == 1 else time.perf_counter
        self.record = rescale.read_record(self.bundle / rescale.RECORD)
        self.statistics = Statistics(self.manifest["sha256"]["model.so"], len(self.record["values"]), keep, seed)
        self.counter = Counter(self.bundle, self.record, self.manifest, self.tvm)
        self.random = np.random.default_rng(seed)
        blank = np.zeros(self.manifest["input"]["shape"], self.manifest["input"]["dtype"])
        # The first calls are slower than others.
        self.cost = min(self._timed(lambda: self.counter(blank)) for _ in range(3))
        self.spent, self.sampled, self.calls = 0.0, 0.0, 0

    def __call__(self, images):
        """What the module gives for one batch; now and then statistics are recorded."""
        timed = self.calls % TIMED == 0
        start = self.clock() if timed else 0.0
        given = self.tvm.runtime.tensor(np.ascontiguousarray(images), device=self.device)
        outputs = self.main(given).numpy()
        self.calls += 1
        if timed:
            self.spent += TIMED * (self.clock() - start)
        # Chance keeps the choice from falling in step with what comes regularly.
        if self.sampled + self.cost <= self.share * self.spent and self.random.random() < 0.5:
            self.observe(images)
        return outputs

    def observe(self, images):
        """Record statistics of one batch, whatever that costs."""
        self.sampled += self._timed(lambda: self.statistics.add(self.counter(images), images))
        self.cost = self.sampled / self.statistics.batches

    def save(self, path):
        """Write what was recorded."""
        preprocessing = json.loads((self.bundle / "preprocessing.json").read_text(encoding="utf-8"))
        write_statistics(path, self.statistics, preprocessing)

    def _timed(self, work):
        start = self.clock()
        work()
        return self.clock() - start


class Statistics:
    """What was counted.

    Args:
        module: SHA-256 of the module's file.
        values: How many values are counted.
        keep: Images to keep.
        seed: Of their choice.
    """

    def __init__(self, module, values, keep, seed=0):
        self.module, self.keep, self.random = module, keep, np.random.default_rng(seed)
        self.counts = np.zeros((values, LEVELS), np.int64)
        self.images, self.batches, self.kept = 0, 0, []

    def add(self, counts, images):
        """Add one batch; every image has the same chance to be among the kept."""
        self.counts += counts
        self.batches += 1
        for image in np.asarray(images):
            self.images += 1
            if len(self.kept) < self.keep:
                self.kept.append(image.copy())
            elif self.keep and (place := int(self.random.integers(self.images))) < self.keep:
                self.kept[place] = image.copy()


class Counter:
    """The module with wider ranges, whose tensors are counted.

    Args:
        bundle: Where the module is.
        record: Its scales.
        manifest: Its manifest.
        tvm: The TVM package.
    """

    def __init__(self, bundle, record, manifest, tvm):
        from tvm.runtime.vm import VirtualMachine

        self.tvm, self.device = tvm, run.device_of(manifest, tvm)
        module = (Path(bundle) / "model.so").read_bytes()
        wide = rescale.with_scales(record, module, rescale.wide_scales_of(record), rescale.wide_tables_of(record))
        self.machine = VirtualMachine(load_bytes(tvm, wide), self.device)
        counted = [op for op in record["ops"] if op["kind"] not in rescale.MOVES and op["output"] >= 0]
        # A replaceable value's own operation; others keep what they have.
        self.value_of = {op["call"]: op["output"] for op in counted if record["values"][op["output"]]["replaceable"]}
        self.counts, self.call, self.strides = np.zeros((len(record["values"]), LEVELS), np.int64), 0, {}
        self.machine.set_instrument(self._look)

    def __call__(self, images):
        """Run one batch; how often every value holds every integer, int64 (values, LEVELS)."""
        self.counts[:], self.call = 0, 0
        self.machine["main"](self.tvm.runtime.tensor(np.ascontiguousarray(images), device=self.device))
        return self.counts

    def _look(self, function, name, before, result, *arguments):
        """Called around every instruction; kernels write what their last argument holds."""
        if not before and name.startswith("qs_"):
            value = self.value_of.get(self.call, -1)
            self.call += 1
            if value >= 0:
                held = np.from_dlpack(arguments[-1]).reshape(-1)
                self.counts[value] += np.bincount(held[:: self._stride(held.size)], minlength=LEVELS)
        return 0

    def _stride(self, size):
        """Without a common factor with the channels, so that all are counted alike."""
        if size not in self.strides:
            stride = max(1, size // COUNTED)
            while math.gcd(stride, size) > 1:
                stride += 1
            self.strides[size] = stride
        return self.strides[size]


def load_bytes(tvm, module):
    """A module from its bytes, by a file that is gone at once."""
    handle, path = tempfile.mkstemp(suffix=".so")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(module)
        return tvm.runtime.load_module(path)
    finally:
        os.unlink(path)


def write_statistics(path, statistics, preprocessing):
    """Write statistics; images that are normalised pixels as pixels, which take a quarter of the bytes."""
    kept = np.stack(statistics.kept) if statistics.kept else np.zeros((0, 1), np.uint8)
    kept = kept if kept.dtype == np.uint8 else as_pixels(kept, preprocessing)
    header = {"format": FORMAT, "version": VERSION, "module": statistics.module, "images": statistics.images}
    header |= {"batches": statistics.batches, "digest": digest(statistics.counts, kept)}
    content = np.frombuffer(json.dumps(header).encode(), np.uint8)
    scratch = Path(f"{path}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            np.savez_compressed(file, header=content, counts=statistics.counts, kept=kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def as_pixels(images, preprocessing):
    """The pixels, uint8 (N, H, W, C), that images were before they were normalised; the images where they were none."""
    mean, std = (np.asarray(preprocessing[name], np.float32) for name in ("mean", "std"))
    pixels = np.clip(np.rint((images.transpose(0, 2, 3, 1) * std + mean) * 255), 0, 255).astype(np.uint8)
    return pixels if np.array_equal(run.normalised(pixels, preprocessing), images) else images


def digest(*arrays):
    """SHA-256 of arrays."""
    content = hashlib.sha256()
    for array in arrays:
        content.update(repr((array.dtype.str, array.shape)).encode() + np.ascontiguousarray(array).tobytes())
    return content.hexdigest()


def run_modules(bundle, modules, images):
    """Outputs of several variants of a bundle's module, (modules, N, ...)."""
    from tvm.runtime.vm import VirtualMachine

    manifest = run.read_manifest(bundle)
    run.check_machine(manifest)
    _, tvm = run.open_module(bundle, manifest)
    rows = []
    for path in modules:
        machine = VirtualMachine(tvm.runtime.load_module(str(path)), run.device_of(manifest, tvm))
        rows.append(run.run_images(machine, manifest, tvm, images))
    return np.stack(rows)


def read_images(paths, bundle, manifest):
    """Images as the module takes them: of .npy files, or of pictures and folders of them."""
    preprocessing, found = json.loads((bundle / "preprocessing.json").read_text(encoding="utf-8")), []
    for path in map(Path, paths):
        if path.suffix == ".npy":
            images, wanted = np.load(path, allow_pickle=False), manifest["input"]
            if images.dtype != wanted["dtype"] or images.shape[1:] != tuple(wanted["shape"][1:]):
                shape = ", ".join(map(str, ["N", *wanted["shape"][1:]]))
                what = f"{path} holds {images.dtype} {images.shape}"
                raise run.BundleProblem(f"{what}; expected {wanted['dtype']} ({shape}), as the module takes them")
            found.extend(images)
            continue
        import predict

        files = sorted(one for one in path.rglob("*") if one.suffix.lower() in PICTURES) if path.is_dir() else [path]
        pixels = [predict.pixels_of(file, preprocessing) for file in files]
        found.extend(pixels if run.takes_pixels(manifest) or not pixels else run.normalised(np.stack(pixels), preprocessing))
    return np.stack(found) if found else np.zeros((0, 1))


def main(arguments):
    """Entry point; `outputs BUNDLE X.npy Y.npy MODULE...` is what `qsearch adapt` tries scales with."""
    if len(arguments) > 4 and arguments[0] == "outputs":
        bundle, images, out, *modules = map(Path, arguments[1:])
        try:
            np.save(out, run_modules(bundle, modules, np.load(images, allow_pickle=False)), allow_pickle=False)
        except run.BundleProblem as problem:
            print(json.dumps({"problem": str(problem)}))
            return problem.status
        print(json.dumps({"outputs": str(out)}))
        return 0
    return _record(arguments)


def _record(arguments):
    """Record statistics of images from the command line."""
    bundle = Path(__file__).parent
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        monitor = Monitor(bundle)
        images = read_images(arguments[1:], bundle, monitor.manifest)
        for batch in run.batches_of(images, monitor.manifest["input"]["shape"][0]):
            monitor.observe(batch)
        monitor.save(arguments[0])
    except (run.BundleProblem, rescale.ScaleProblem) as problem:
        print(f"problem: {problem}", file=sys.stderr)
        return 1
    # What Pillow and NumPy raise on files that they cannot read; a detector's bundle has no predict.py.
    except (ImportError, OSError, ValueError, SyntaxError) as error:
        print(f"problem: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"statistics": arguments[0], "images": monitor.statistics.images}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
