"""Run and check a bundle with nothing but NumPy and TVM's runtime.

This file is copied into every bundle as run.py and stands alone; `verify` runs it in a fresh process.

    python run.py BUNDLE                 check the files, replay the recorded outputs, time the module
    python run.py BUNDLE predict X.npy   print the best classes for images
    python run.py BUNDLE outputs X.npy Y.npy   write what the module gives for them to a file

Images are float32 (N, C, H, W), preprocessed; of a bundle whose manifest says that its input is uint8 they are pixels, (N, H, W,
C), resized and cropped only, and the module gives the index of the class.

A module for several threads wants an idle machine: its threads wait for work by yielding their processor, and beside
another busy process it may be ten times slower than on one thread.

Output is one JSON document. Exit status: 0 good; 1 corrupt, does not replay, or fails; 3 wrong machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import stat
import sys
import time
from pathlib import Path

import numpy as np

WRONG_MACHINE = 3
# A detector's bundle has this file.
DETECTION = "detection.json"
# Of the manifest and of what the files it lists hold. 2: pictures are recorded as pixels.
FORMAT = 2
# No file of a bundle is larger, and none in JSON.
MOST_BYTES, MOST_JSON_BYTES = 1 << 36, 1 << 24
ALONE = "timed alone, one inference right after the other"


class BundleProblem(Exception):
    """What is wrong with a bundle, and the exit status that says so."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def read_manifest(bundle):
    """The manifest, after checking that every file it lists is there and unchanged."""
    try:
        manifest = read_json(bundle / "manifest.json")
        version = manifest["format"]
        own = own_digest(manifest)
    except OSError as error:
        raise BundleProblem(f"{bundle} is not a bundle: manifest.json cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleProblem(f"{bundle}/manifest.json is damaged: {repr(error)[:200]}; export the bundle again") from error
    if version != FORMAT:
        version = str(version)[:20]
        raise BundleProblem(f"{bundle} has format {version}, this runner reads format {FORMAT}; use the bundle's own run.py")
    if own != manifest.get("self_sha256"):
        raise BundleProblem(f"{bundle}/manifest.json was changed; export the bundle again")
    check_manifest(bundle, manifest)
    for name, expected in manifest["sha256"].items():
        try:
            found = file_digest(bundle / name)
        except OSError as error:
            raise BundleProblem(f"{bundle}/{name} cannot be read ({error.strerror}); export the bundle again") from error
        if found != expected:
            raise BundleProblem(
                f"{bundle}/{name} was changed (SHA-256 {found[:16]}..., expected {expected[:16]}...); export the bundle again"
            )
    return manifest


def check_manifest(bundle, manifest):
    """Refuse a manifest that lacks something that is read of it, or names a file that does not lie beside it."""
    try:
        target, given, listed = manifest["target"], manifest["input"], manifest["sha256"]
        texts = [target["description"], target.get("arch", ""), *target["cpu_flags"], given["dtype"], *listed, *listed.values()]
        numbers = [target["threads"], manifest.get("version", 1), *given["shape"]]
        whole = all(isinstance(one, str) for one in texts) and all(type(one) is int and one > 0 for one in numbers)
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise BundleProblem(f"{bundle}/manifest.json is damaged: something is missing in it; export the bundle again")
    unsafe = [name for name in listed if not re.fullmatch(r"\w[\w.-]*", name)]
    if unsafe:
        raise BundleProblem(f"{bundle}/manifest.json names a file {unsafe[0][:100]!r}, which is no name of a file beside it")


def open_file(path, most=MOST_BYTES):
    """A regular file, opened to be read: no link, and nothing that reading could wait for."""
    state = path.lstat()
    if not stat.S_ISREG(state.st_mode) or state.st_size > most:
        raise BundleProblem(f"{path} is a link, no file, or larger than {most} bytes: no export has written that")
    return path.open("rb")


def read_json(path):
    """What a JSON file holds."""
    with open_file(path, MOST_JSON_BYTES) as file:
        return json.loads(file.read(MOST_JSON_BYTES).decode("utf-8"))


def file_digest(path):
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def own_digest(manifest):
    """SHA-256 of what a manifest says, itself left out."""
    own = json.dumps({key: value for key, value in manifest.items() if key != "self_sha256"}, sort_keys=True)
    return hashlib.sha256(own.encode()).hexdigest()


def check_machine(manifest):
    """Refuse a module that uses instructions this machine does not have: it would die of an illegal instruction."""
    here = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    wanted = manifest["target"].get("architecture", here)
    if wanted != here:
        raise BundleProblem(f"the module was compiled for {wanted}; this machine is {here}", WRONG_MACHINE)
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    flags = {re.sub(r"[._-]", "", flag) for flag in match.group(1).split()} if match else set()
    missing = sorted(set(manifest["target"]["cpu_flags"]) - flags) if flags else []
    if missing:
        raise BundleProblem(
            f"the module was compiled for {manifest['target']['description']}; this machine lacks {', '.join(missing)}. "
            "Search and export with --target portable, or on a machine of this kind",
            WRONG_MACHINE,
        )


def open_module(bundle, manifest):
    """A virtual machine of the bundle's module, on as many threads as it was measured with, and the TVM package.

    On fewer where there are fewer processors: threads that wait for each other's processor are worse than none.
    """
    # The runtime is enough: no compiler is loaded. All must be set before TVM is imported. Bound threads do worse still
    # where they meet another process.
    os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    os.environ["TVM_NUM_THREADS"] = str(min(manifest["target"]["threads"], processor_count()))
    import tvm
    from tvm.runtime.vm import VirtualMachine

    machine = VirtualMachine(tvm.runtime.load_module(str(bundle / "model.so")), device_of(manifest, tvm))
    return machine, tvm


def device_of(manifest, tvm):
    """Where the module runs: the CPU, or the first GPU.

    Raises:
        BundleProblem: There is no GPU, or one of another architecture.
    """
    arch = manifest["target"].get("arch", "")
    if not arch:
        return tvm.cpu()
    device = tvm.cuda(0)
    if not device.exist:
        raise BundleProblem(f"the module was compiled for a GPU, {arch}; this machine has none that TVM can use", WRONG_MACHINE)
    here = "sm_" + str(device.compute_version).replace(".", "")
    if here != arch:
        raise BundleProblem(f"the module was compiled for {arch}; this machine's GPU is {here}", WRONG_MACHINE)
    return device


def processor_count():
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_images(machine, manifest, tvm, images):
    """Outputs, float32 (N, ...) or class indices int32 (N,), of images as the module takes them, batch by batch."""
    function, device = machine["main"], device_of(manifest, tvm)
    batches = batches_of(images, manifest["input"]["shape"][0])
    given = (tvm.runtime.tensor(np.ascontiguousarray(batch), device=device) for batch in batches)
    return np.concatenate([function(batch).numpy() for batch in given])[: len(images)]


def batches_of(images, batch):
    """So many images at a time; where fewer are left, these again from their first."""
    return (images[start:][np.arange(batch) % (len(images) - start)] for start in range(0, len(images), batch))


def varied(pictures):
    """Eight inputs of each picture, uint8 (N, H, W, C): as it is, mirrored, upside down, both; then those of its negative."""
    positions = [pictures, pictures[:, :, ::-1], pictures[:, ::-1], pictures[:, ::-1, ::-1]]
    kinds = np.stack([*positions, *(255 - one for one in positions)], axis=1)
    return kinds.reshape(-1, *pictures.shape[1:])


def normalised(pictures, preprocessing):
    """Pictures, uint8 (N, H, W, C), as the float32 (N, C, H, W) that a module takes; float32 operation by operation."""
    mean, std = (np.asarray(preprocessing[name], np.float32) for name in ("mean", "std"))
    return np.ascontiguousarray(((pictures.astype(np.float32) / np.float32(255) - mean) / std).transpose(0, 3, 1, 2))


def takes_pixels(manifest):
    """Whether normalisation is inside the module, and the choice of the class."""
    return manifest["input"]["dtype"] == "uint8"


def recorded_inputs(bundle, manifest):
    """The inputs whose outputs were recorded: made of pictures, or float32 as they are where the model's are no pictures."""
    stored = np.load(bundle / "recorded_inputs.npy", allow_pickle=False)
    if stored.dtype != np.uint8 or takes_pixels(manifest):
        return stored if stored.dtype != np.uint8 else varied(stored)
    preprocessing = read_json(bundle / "preprocessing.json")
    return normalised(varied(stored), preprocessing)


def verify(bundle):
    """Replay every recorded input and count the bits that differ; time the module."""
    manifest = read_manifest(bundle)
    check_machine(manifest)
    inputs = recorded_inputs(bundle, manifest)
    expected = np.load(bundle / "recorded_outputs.npy", allow_pickle=False)
    machine, tvm = open_module(bundle, manifest)
    outputs = run_images(machine, manifest, tvm, inputs)
    different = np.bitwise_xor(outputs.view(np.uint8), expected.view(np.uint8))
    latency = time_module(machine, manifest, tvm, next(batches_of(inputs, manifest["input"]["shape"][0])))
    return {
        "bundle": str(bundle),
        "files": len(manifest["sha256"]),
        "outputs": int(expected.size),
        "mismatching_bits": int(np.unpackbits(different).sum()),
        "recorded_latency_ms": manifest["metrics"]["latency_ms"],
        "recorded_timing": recorded_timing(bundle),
        **latency,
        "timing": ALONE,
    }


def recorded_timing(bundle):
    """How the latency among a bundle's figures came about: only one that was timed alone compares with what is timed here."""
    latency = read_json(bundle / "metrics.json")["search"]["latency"]
    if latency.get("source") == "modelled":
        return "added up from the times of its kernels"
    return ALONE if latency.get("ratio") is None else "timed in turns with the float module, on that one's clock"


def time_module(machine, manifest, tvm, image):
    """Median latency over 21 repeats of about 5 ms each, and half their interquartile range.

    A module for one thread by that thread's own clock, as the search has timed it: what else has the processor meanwhile does
    not count. One for several by the clock on the wall, one for a GPU by the GPU's.
    """
    device = device_of(manifest, tvm)
    own_clock = manifest["target"]["threads"] == 1 and not manifest["target"].get("arch")
    given = tvm.runtime.tensor(np.ascontiguousarray(image), device=device)
    once = machine.time_evaluator("main", device, number=5, repeat=2)(given).results[-1]
    number = max(1, round(0.005 / max(once, 1e-7)))
    timed = machine.time_evaluator("main", device, number=number, repeat=1)
    times = []
    for _ in range(21):
        own = time.thread_time()
        seconds = timed(given).results[0]
        # TVM runs once more before it counts.
        own = (time.thread_time() - own) / (number + 1)
        times.append(1e3 * (own if own_clock else seconds))
    low, middle, high = np.percentile(times, [25, 50, 75])
    return {"latency_ms": float(middle), "latency_spread_ms": float((high - low) / 2)}


def outputs(bundle, images):
    """What the module gives for images, float32 (N, ...) or class indices int32 (N,)."""
    manifest = read_manifest(bundle)
    check_machine(manifest)
    given, wanted = images.dtype.kind, manifest["input"]
    if list(images.shape[1:]) != wanted["shape"][1:] or (given == "u") != takes_pixels(manifest):
        what = f"{wanted['dtype']} images of shape (N, {', '.join(map(str, wanted['shape'][1:]))}), {wanted['layout']}"
        raise BundleProblem(f"the module takes {what}; got {images.dtype} of shape {images.shape}")
    machine, tvm = open_module(bundle, manifest)
    return run_images(machine, manifest, tvm, images.astype(wanted["dtype"], copy=False))


def predict(bundle, images, best=5):
    """The best classes of every image, with softmax probabilities; the class alone where that is all the module gives."""
    if (bundle / DETECTION).exists():
        raise BundleProblem(f"{bundle} holds a detector, which classifies nothing: give outputs X.npy Y.npy instead of predict")
    classes = read_json(bundle / "classes.json")
    rows = []
    found = outputs(bundle, images)
    if found.ndim == 1:
        return [[{"class": int(one), "name": name_of(classes, int(one))}] for one in found]
    for logits in found:
        weights = np.exp(logits.astype(np.float64) - logits.max())
        order = np.argsort(-logits, kind="stable")[:best]
        rows.append(
            [{"class": int(i), "name": name_of(classes, int(i)), "probability": float(weights[i] / weights.sum())} for i in order]
        )
    return rows


def name_of(classes, index):
    """A class's name; its index where the bundle knows none."""
    return classes[index] if index < len(classes) else str(index)


def main(arguments):
    """Entry point."""
    bundle = Path(arguments[0]) if arguments else Path(__file__).parent
    try:
        if len(arguments) >= 3 and arguments[1] == "predict":
            print(json.dumps(predict(bundle, np.load(arguments[2], allow_pickle=False))))
            return 0
        if len(arguments) >= 4 and arguments[1] == "outputs":
            np.save(arguments[3], outputs(bundle, np.load(arguments[2], allow_pickle=False)), allow_pickle=False)
            print(json.dumps({"outputs": arguments[3]}))
            return 0
        result = verify(bundle)
    except BundleProblem as problem:
        print(json.dumps({"bundle": str(bundle), "problem": str(problem)}))
        return problem.status
    print(json.dumps(result))
    return 1 if result["mismatching_bits"] else 0


if __name__ == "__main__":
    # TVM's bindings load torch where that is installed: it takes seconds, and nothing here needs it.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    sys.exit(main(sys.argv[1:]))
