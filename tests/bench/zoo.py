"""Which of torchvision's classification networks qsearch imports and runs; prints a table and the share that runs.

    python tests/bench/zoo.py --only 'shufflenet*' --precision int8

Every builder with random weights and settled batch norm, one image at the model's own size. In fp32 the compiled
module must agree with PyTorch to 1e-4, or be as close to float64 as PyTorch's float32 is. In int8 every integer
kernel must equal the NumPy reference bit for bit on the network's own values. Each network runs in a process of its
own, so that a crash, a hang or a lack of memory is one line of the result.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TVM_NUM_THREADS", "1")

import numpy as np
import torch

from qsearch.build.cache import KernelCache, kernel_symbol
from qsearch.build.foreign import run_foreign
from qsearch.build.link import Linker
from qsearch.build.target import open_target
from qsearch.calibrate.observe import observe
from qsearch.calibrate.ranges import activation_ranges
from qsearch.config import QuantConfig
from qsearch.errors import QSearchError, UnsupportedModelError
from qsearch.kernels.cpu import describe_kernel
from qsearch.models.graph import Model
from qsearch.models.import_torch import import_model
from qsearch.models.torchvision_import import import_torchvision
from qsearch.models.zoo import load_model
from qsearch.quantize.lower import lower
from qsearch.quantize.program import Op, Program
from qsearch.quantize.reference import run_op
from qsearch.quantize.weight_store import WeightStore

# Largest difference of float logits, relative to the largest logit.
FLOAT_TOLERANCE = 1e-4
# Beyond it: how much further from float64 than PyTorch's float32.
LARGEST_EXCESS = 3.0
CALIBRATION_IMAGES = 2
# These compute in float inside, whatever they read and write.
FLOAT_ROWS = ("layer_norm", "softmax", "l2_normalize")


@dataclass(frozen=True)
class Outcome:
    """What became of one network at one precision.

    Attributes:
        name: torchvision's name.
        precision: 'fp32' or 'int8'.
        status: 'runs', 'refused' (an UnsupportedModelError), 'differs' or 'fails'.
        reason: What was found, or why it does not run.
        seconds: Time of the whole process.
        integer_ops: Distinct integer operations that were compared with the reference.
        latency_ms: Least time of three calls.
    """

    name: str
    precision: str
    status: str
    reason: str
    seconds: float = 0.0
    integer_ops: int = 0
    latency_ms: float = 0.0


def check(name: str, precisions: list[str], size: int | None, cache: Path) -> Iterator[Outcome]:
    """Import one network, then compile and check it at every precision."""
    loaded = load_model(f"torchvision:{name}")
    shape = (1, 3, size, size) if size else (1, *loaded.preprocessing.shape)
    image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    model = import_model(name, loaded.module, shape)
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(loaded.module(torch.from_numpy(image)))[0].numpy()
    del loaded
    for precision in precisions:
        try:
            yield check_precision(model, precision, image, expected, KernelCache(cache, open_target("host")))
        except QSearchError as error:
            yield failure(name, precision, error)


def failure(name: str, precision: str, error: QSearchError) -> Outcome:
    """A refusal in the model's own terms, or any other failure."""
    status = "refused" if isinstance(error, UnsupportedModelError) else "fails"
    return Outcome(name, precision, status, f"{type(error).__name__}: {error}")


def judged(name: str, image: np.ndarray, logits: np.ndarray, expected: np.ndarray) -> dict[str, str]:
    """Status and reason of a network so deep that PyTorch's own float32 may be as far from the truth: float64 decides."""
    module = load_model(f"torchvision:{name}").module.double()
    with torch.no_grad():
        exact = torch.utils._pytree.tree_leaves(module(torch.from_numpy(image).double()))[0].numpy()
    ours, theirs = (float(np.abs(values - exact).max() / np.abs(exact).max()) for values in (logits, expected))
    status = "runs" if ours <= LARGEST_EXCESS * theirs else "differs"
    return {"status": status, "reason": f"{ours:.1e} from float64, relative, where PyTorch's float32 is {theirs:.1e}"}


def check_precision(model: Model, precision: str, image: np.ndarray, expected: np.ndarray, cache: KernelCache) -> Outcome:
    """Compile a network and compare its logits with PyTorch's, and its integer operations with the reference."""
    import tvm

    program = lowered(model, precision, image)
    function, given = Linker(cache).build(program).open()["main"], tvm.runtime.tensor(image)
    logits = function(given).numpy()
    latency_ms = min(timed(partial(function, given)) for _ in range(3))
    difference = float(np.abs(logits - expected).max() / max(np.abs(expected).max(), 1e-12))
    outcome = Outcome(model.name, precision, "runs", f"{difference:.1e} from PyTorch, relative", latency_ms=latency_ms)
    if precision == "fp32" and difference > FLOAT_TOLERANCE:
        return replace(outcome, **judged(model.name, image, logits, expected))
    if not np.isfinite(logits).all():
        return replace(outcome, status="differs")
    if precision == "fp32":
        return outcome
    del function
    wrong, checked = compare(program, image, cache)
    if wrong:
        return replace(outcome, status="differs", reason=f"not the reference's bits: {', '.join(wrong[:4])}", integer_ops=checked)
    return replace(outcome, reason=f"{outcome.reason}; {summary(program)}", integer_ops=checked)


def lowered(model: Model, precision: str, image: np.ndarray) -> Program:
    """Lower with ranges from noise that includes the checked image."""
    config = QuantConfig.model_validate({"default_precision": precision})
    others = np.random.default_rng(1).standard_normal((CALIBRATION_IMAGES - 1, *image.shape[1:])).astype(np.float32)
    images = np.concatenate([image, others])
    reach = float(np.abs(images).max())
    if precision == "fp32":
        return lower(model, config, {}, WeightStore())
    ranges = activation_ranges(observe(model, images, 1), model, config.calibration, (-reach, reach))
    return lower(model, config, ranges, WeightStore())


def timed(call: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def compare(program: Program, image: np.ndarray, cache: KernelCache) -> tuple[list[str], int]:
    """Run the program kernel by kernel; the operations that differ from the reference, and how many were compared.

    Every kernel is compared where it is first used. What is not integer arithmetic is not compared, only computed,
    by torch where it is foreign.
    """
    left = Counter(name for op in program.ops for name in op.inputs)
    values, wrong, checked = {program.input.name: image}, [], set()
    for op in program.ops:
        inputs = [values[name] for name in op.inputs]
        if op.key.kind == "foreign":
            found = run_foreign(op.key, op.constants, inputs)
        else:
            found = run_compiled(op, inputs, cache)
            if is_exact(op) and op.key not in checked:
                checked.add(op.key)
                if not np.array_equal(found, run_op(op, inputs)):
                    wrong.append(op.name)
        values[op.output.name] = found
        left.subtract(op.inputs)
        for name in set(op.inputs):
            if not left[name]:
                del values[name]
    return wrong, len(checked)


def is_exact(op: Op) -> bool:
    """True where the arithmetic is integer, so that the reference defines every bit."""
    if op.key.kind in FLOAT_ROWS:
        return False
    return op.key.precision == "int8" or (op.key.precision is None and "uint8" in op.key.dtypes)


def run_compiled(op: Op, inputs: list[np.ndarray], cache: KernelCache) -> np.ndarray:
    """One operation by its kernel."""
    import tvm

    kernel = describe_kernel(op.key, cache.target.isa, cache.target.threads)
    symbol = kernel_symbol(kernel, cache.target)
    constants = list(kernel.pack(op.constants))
    if kernel.pack_weight is not None:
        constants.insert(0, kernel.pack_weight(op.constants))
    output = tvm.runtime.tensor(np.zeros(op.output.size, op.output.dtype))
    arguments = [tvm.runtime.tensor(np.ascontiguousarray(array).ravel()) for array in inputs]
    arguments += [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in constants]
    cache.get([(symbol, kernel)])[symbol].library[symbol](*arguments, output)
    return output.numpy().reshape(op.output.shape)


def summary(program: Program) -> str:
    """Foreign operators and conversions that are left in the program, the most frequent first."""
    kinds = Counter(op.key.foreign.target if op.key.foreign else op.key.kind for op in program.ops if not is_exact(op))
    return "float: " + (", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "nothing")


def run_child(name: str, options: argparse.Namespace) -> list[Outcome]:
    """Check one network in a process of its own."""
    command = [sys.executable, __file__, "--child", name, "--precision", options.precision, "--cache", str(options.cache)]
    command += ["--memory-gib", str(options.memory_gib)] + (["--size", str(options.size)] if options.size else [])
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        printed, errors = process.communicate(timeout=options.limit_s)
        how = signal.Signals(-process.returncode).name if process.returncode < 0 else f"exit status {process.returncode}"
        reason = f"{how}: {(errors.strip().splitlines() or [''])[-1]}"
    except subprocess.TimeoutExpired:
        process.kill()
        printed, reason = process.communicate()[0], f"more than {options.limit_s} s"
    seconds = time.monotonic() - start
    lines = [line for line in printed.splitlines() if line.startswith('{"name"')]
    found = {row["precision"]: Outcome(**(row | {"seconds": seconds})) for row in map(json.loads, lines)}
    return [
        found.get(precision, Outcome(name, precision, "fails", reason, seconds)) for precision in options.precision.split(",")
    ]


def child(options: argparse.Namespace) -> None:
    """Check one network here and print its outcomes, each as soon as it is known."""
    resource.setrlimit(resource.RLIMIT_DATA, (options.memory_gib << 30, options.memory_gib << 30))
    torch.set_num_threads(1)
    precisions = options.precision.split(",")
    try:
        for outcome in check(options.child, precisions, options.size, options.cache):
            print(json.dumps(asdict(outcome)), flush=True)
    except QSearchError as error:
        for precision in precisions:
            print(json.dumps(asdict(failure(options.child, precision, error))), flush=True)


def names(pattern: str) -> list[str]:
    """torchvision's classification builders that match a pattern."""
    models = import_torchvision().models
    return [name for name in sorted(models.list_models(module=models)) if any(fnmatch(name, p) for p in pattern.split(","))]


def main() -> None:
    """Run the checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="comma-separated patterns of names")
    parser.add_argument("--precision", default="fp32,int8", help="fp32, int8 or both, separated by a comma")
    parser.add_argument("--size", type=int, help="height and width of the image instead of the model's own")
    parser.add_argument("--limit-s", type=int, default=1800, help="seconds a network may take")
    parser.add_argument("--memory-gib", type=int, default=16, help="memory a network may take")
    parser.add_argument("--json", type=Path, help="write the outcomes to this file")
    parser.add_argument("--cache", type=Path, default=Path("studies/cache/kernels"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    outcomes = []
    for name in names(options.only):
        for found in run_child(name, options):
            outcomes.append(found)
            row = f"{found.name:<20} {found.precision:<5} {found.status:<8} {found.seconds:6.0f} s {found.latency_ms:8.2f} ms "
            print(f"{row} {found.integer_ops:3} exact  {found.reason}", flush=True)
            if options.json:
                options.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1), encoding="utf-8")
    good = Counter(found.name for found in outcomes if found.status == "runs")
    whole = sum(count == len(options.precision.split(",")) for count in good.values())
    total = len({found.name for found in outcomes})
    print(f"{whole} of {total} networks run ({whole / max(total, 1):.0%})")


if __name__ == "__main__":
    main()
