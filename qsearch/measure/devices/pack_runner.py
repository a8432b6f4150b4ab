"""Check and time the kernels of a pack with nothing but NumPy and TVM's runtime.

This file is the __main__.py of every pack and stands alone; `qsearch measure-pack` runs it in a fresh process.

    python FILE [--out TABLE.json]       check every kernel, time those that are right, write the cost table

Exit status: 0 good; 1 a kernel is wrong or the pack is damaged; 2 wrong machine, device or version.
"""

import hashlib
import io
import json
import os
import platform
import re
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

KIND, SCHEMA, ELSEWHERE = "pack", 1, 2
# All members of a pack, unpacked.
MOST_BYTES, MOST_MANIFEST_BYTES, MOST_MEMBERS = 1 << 35, 1 << 26, 100_000
# Outputs are full of one, then of the other before a kernel runs: what it leaves out cannot look right both times.
POISONS = (0xA5, 0x5A)
REPEATS, REPEAT_S = 21, 2e-3


class PackProblem(Exception):
    """What is wrong, and the exit status that says so."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def read_manifest(archive):
    """The manifest, after checking that the archive holds what it lists, unchanged, and nothing else."""
    again = "copy the pack again or make a new one"
    if len(archive.namelist()) > MOST_MEMBERS or sum(one.file_size for one in archive.infolist()) > MOST_BYTES:
        raise PackProblem(f"the pack has too many members, or they unpack to more than {MOST_BYTES} bytes; {again}")
    try:
        if archive.getinfo("manifest.json").file_size > MOST_MANIFEST_BYTES:
            raise ValueError("its manifest is too large")
        manifest = json.loads(archive.read("manifest.json"))
        listed, schema = dict(manifest["sha256"]), manifest["schema"]
        own = own_digest(manifest)
        names = sorted(archive.namelist())
        damaged = {name for name in names if name != "manifest.json" and member_digest(archive, name) != listed.get(name)}
    # What json, zipfile and what it unpacks with raise on bytes that are not theirs is a dozen kinds.
    except Exception as error:
        raise PackProblem(f"the pack is damaged ({str(error)[:200]}); {again}") from error
    if schema != SCHEMA:
        raise PackProblem(f"the pack has schema {schema}, this program reads {SCHEMA}: run the pack itself", ELSEWHERE)
    if own != manifest.get("self_sha256") or names != sorted([*listed, "manifest.json"]) or damaged:
        raise PackProblem(f"{', '.join(sorted(damaged)) or 'manifest.json'} was changed or is not listed; {again}")
    unsafe = [name for name in names if not re.fullmatch(r"((kernels|data)/)?\w[\w.-]*", name)]
    if unsafe:
        raise PackProblem(f"the pack names a file {unsafe[0]!r}, which is no safe path; {again}")
    return manifest


def own_digest(manifest):
    """SHA-256 of what a manifest says, itself left out."""
    own = json.dumps({key: value for key, value in manifest.items() if key != "self_sha256"}, sort_keys=True)
    return hashlib.sha256(own.encode()).hexdigest()


def member_digest(archive, name):
    """SHA-256 of a member, piece by piece: it may be larger than it looks."""
    found = hashlib.sha256()
    with archive.open(name) as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def open_archive(file):
    """A pack, opened."""
    try:
        if not Path(file).is_file():
            raise OSError("it is no file")
        return zipfile.ZipFile(file)
    # A damaged directory makes zipfile raise a dozen kinds.
    except Exception as error:
        raise PackProblem(f"{file} cannot be read as a pack: {error}") from error


def check_machine(target):
    """Refuse code for another architecture or with instructions that this machine lacks; what the processor is called."""
    here = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    if target["architecture"] != here:
        raise PackProblem(f"the pack is for {target['architecture']} and this machine is {here}", ELSEWHERE)
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or here
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    flags = {re.sub(r"[._-]", "", flag) for flag in match.group(1).split()} if match else set()
    missing = sorted(set(target["cpu_flags"]) - flags) if flags else []
    if missing:
        raise PackProblem(f"the pack is for {target['description']}; this machine lacks {', '.join(missing)}", ELSEWHERE)
    return "; ".join(sorted(set(re.findall(r"^(?:model name|CPU part)\s*: (.*)$", text, re.MULTILINE)))) or here


def open_device(tvm, manifest, file, processor):
    """The device that the pack is for, and what it is called."""
    target, found, wanted = manifest["target"], tvm.__version__, manifest["versions"]["tvm"]
    if found != wanted:
        raise PackProblem(f"the pack was made with TVM {wanted}, here is {found}: pip install apache-tvm=={wanted}", ELSEWHERE)
    if target["device"] == "cpu":
        return tvm.cpu(0), processor
    device, why = tvm.device(target["device"], 0), ""
    try:
        if device.exist:
            check_arch(target, "sm_" + str(device.compute_version).replace(".", ""))
            return device, str(device.device_name)
    except (RuntimeError, ValueError, AttributeError) as error:
        why = f" ({(str(error).strip().splitlines() or [type(error).__name__])[-1][:200]})"
    raise PackProblem(
        f"no {target['device'].upper()} device is here{why}, so kernels for {target['name']} cannot be measured; copy the pack "
        f"to a machine that has one, with NumPy and apache-tvm=={found}, and run: python {Path(file).name} --out table.json",
        ELSEWHERE,
    )


def check_arch(target, here):
    """Refuse a GPU of another architecture: it cannot load the machine code."""
    if target["arch"] != here:
        words = f"the pack is for {target['name']} and this machine's GPU is {here}: make one for cuda:{here}"
        raise PackProblem(words, ELSEWHERE)


class Bench:
    """A device, and the pack whose arrays go there."""

    def __init__(self, tvm, device, archive, threads):
        self.tvm, self.device, self.archive = tvm, device, archive
        # On one thread of a CPU that thread's own clock counts, as for trials: what else had the processor does not.
        self.own_clock = device == tvm.cpu(0) and threads == 1

    def array(self, name):
        """An array of the pack."""
        array = np.load(io.BytesIO(self.archive.read(name)), allow_pickle=False)
        if array.dtype.kind != "V":
            return array
        # NumPy has no name of its own for what TVM's package ml_dtypes adds.
        import ml_dtypes

        return array.view(ml_dtypes.float8_e4m3fn)

    def tensor(self, array):
        """An array on the device."""
        return self.tvm.runtime.tensor(np.ascontiguousarray(array), self.device)

    def check(self, function, expected, tolerance, arguments):
        """What is wrong with a kernel's output; None for nothing."""
        for poison in POISONS:
            output = self.tensor(np.full(expected.nbytes, poison, np.uint8).view(expected.dtype).reshape(expected.shape))
            function(*arguments, output)
            self.device.sync()
            found, wanted = output.numpy().reshape(-1), expected.reshape(-1)
            if tolerance is None:
                wrong = (found.view(np.uint8) != wanted.view(np.uint8)).reshape(len(wanted), -1).any(1)
            else:
                exactly = wanted.astype(np.float64)
                bound = 1.0 if wanted.dtype.kind in "iu" else tolerance * max(float(np.abs(exactly).max()), 1e-6)
                wrong = ~(np.abs(found.astype(np.float64) - exactly) <= bound)
            if wrong.any():
                at = int(np.argmax(wrong))
                return f"{int(wrong.sum())} of {len(wanted)} outputs are wrong; number {at} is {found[at]}, expected {wanted[at]}"
        return None

    def time(self, module, name, arguments):
        """Seconds of one call: median, quartiles, half their distance."""
        once = module.time_evaluator(name, self.device, number=3, repeat=2)(*arguments).results[-1]
        number = max(1, round(REPEAT_S / max(once, 1e-8)))
        timed, times = module.time_evaluator(name, self.device, number=number, repeat=1), []
        for _ in range(REPEATS):
            own = time.thread_time()
            seconds = timed(*arguments).results[0]
            # TVM runs once more before it counts.
            own = (time.thread_time() - own) / (number + 1)
            times.append(own if self.own_clock else seconds)
        low, middle, high = (float(value) for value in np.percentile(times, [25, 50, 75]))
        return {"seconds": middle, "quartiles": [low, high], "spread": (high - low) / 2, "repeats": REPEATS, "number": number}


def measure_kernel(bench, library, kernel):
    """A kernel's record: whether it is right, and then its time."""
    arguments, expected = [bench.tensor(bench.array(name)) for name in kernel["arguments"]], bench.array(kernel["expected"])
    record = {name: kernel[name] for name in ("what", "operation", "tolerance", "tile", "tile_group")}
    try:
        problem = bench.check(library[kernel["symbol"]], expected, kernel["tolerance"], arguments)
        if problem is None:
            timing = bench.time(library, kernel["symbol"], [*arguments, bench.tensor(np.empty_like(expected))])
            return record | {"exact": True} | timing
    except RuntimeError as error:
        problem = str(error).strip().splitlines()[-1]
    return record | {"exact": False, "problem": problem}


def measure_pack(file):
    """Check a pack and measure its kernels: the cost table."""
    with open_archive(file) as archive, tempfile.TemporaryDirectory() as scratch:
        manifest = read_manifest(archive)
        target, chain = manifest["target"], manifest["chain"]
        processor = check_machine(target)
        if "tvm" not in sys.modules:
            # The runtime is enough: no compiler is loaded. All must be set before TVM is imported, and means nothing after.
            os.environ |= {"TVM_USE_RUNTIME_LIB": "1", "TVM_BIND_THREADS": "0", "TVM_NUM_THREADS": str(target["threads"])}
        import tvm
        from tvm.runtime.vm import VirtualMachine

        device, name = open_device(tvm, manifest, file, processor)
        members = [one for one in manifest["sha256"] if one.startswith("kernels/")]
        libraries = {one: tvm.runtime.load_module(archive.extract(one, scratch)) for one in members}
        bench = Bench(tvm, device, archive, target["threads"])
        kernels = {one["symbol"]: measure_kernel(bench, libraries[one["library"]], one) for one in manifest["kernels"]}
        image, chains = bench.tensor(np.zeros(chain["shape"], "float32")), chain["calls"]
        whole = {n: bench.time(VirtualMachine(libraries[one], device), "main", [image])["seconds"] for one, n in chains.items()}
        few, many = min(whole), max(whole)
        called = (whole[many] - whole[few]) / (many - few)
        direct = kernels[chain["symbol"]].get("seconds", called)
    return {
        "format": "qsearch cost table",
        "schema": SCHEMA,
        "device": name,
        **{part: manifest[part] for part in ("model", "target", "made_by")},
        "pack_sha256": manifest["self_sha256"],
        "versions": {"tvm": tvm.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        # A kernel with nothing to do, called directly as all are timed, and by a module; what an inference costs besides.
        "call": {"direct_seconds": direct, "in_module_seconds": called, "overhead_seconds": called - direct},
        "inference_seconds": max(whole[few] - few * called, 0.0),
        "kernels": kernels,
    }


def write_table(path, table):
    """Write the table; an earlier one is replaced once the new one has reached the disk."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(json.dumps(table, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def main(file, out):
    """Print one JSON line of how it went, write the table; the exit status."""
    try:
        table = measure_pack(file)
    except PackProblem as problem:
        print(json.dumps({"pack": file, "problem": str(problem)}))
        print(f"error: {problem}", file=sys.stderr)
        return problem.status
    problems = {symbol: f"{one['what']}: {one['problem']}" for symbol, one in table["kernels"].items() if not one["exact"]}
    if out:
        write_table(Path(out), table)
    counts = {"device": table["device"], "kernels": len(table["kernels"]), "wrong": len(problems), "problems": problems}
    print(json.dumps({"pack": file, **counts, "table": out}))
    return 1 if problems else 0


if __name__ == "__main__":
    # TVM's bindings load torch where that is installed: it takes seconds, and nothing here needs it.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    here = str(Path(__file__).parent)
    given = sys.argv[1:] if not zipfile.is_zipfile(here) else [here, *sys.argv[1:]]
    if len(given) not in (1, 3) or given[1:2] not in ([], ["--out"]):
        sys.exit("usage: python FILE [--out TABLE.json]")
    sys.exit(main(given[0], given[2] if len(given) > 1 else None))
