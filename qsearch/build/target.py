"""Targets: what machine a module is compiled for, and which instruction set its kernels use."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qsearch.errors import UsageError
from qsearch.kernels import cpu, cuda
from qsearch.kernels.cpu import ISAS, Isa
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["Target", "Tile", "host_architecture", "host_flags", "open_target", "require_runnable"]

Tile = cpu.Tile | cuda.Tile
# Tried in order after the machine's own name: the x86-64 micro-architecture levels, then anything.
FALLBACK_CPUS = ("x86-64-v4", "x86-64-v3", "x86-64-v2")
# Feature families whose absence under a hypervisor must change the choice of the CPU name.
CHECKED_FEATURES = re.compile(r"avx|fma|sse4|f16c")
# AArch64 features that LLVM uses unasked -> the kernel's name for them.
ARM_FLAGS = {
    "neon": "asimd",
    "dotprod": "asimddp",
    "fullfp16": "asimdhp",
    "rdm": "asimdrdm",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "lse": "atomics",
    "complxnum": "fcma",
    "sve": "sve",
    "sve2": "sve2",
}
# What TVM must know of every GPU that qsearch compiles for.
_GPU = {
    "kind": "cuda",
    "max_threads_per_block": 1024,
    "max_shared_memory_per_block": 49152,
    "thread_warp_size": 32,
    "registers_per_block": 65536,
}
# Architectures with the matrix instructions that the kernels are made of, and an L2 cache that they are tuned to.
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120")
TRIPLES = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}


@dataclass(frozen=True)
class Target:
    """A CPU or a GPU to compile for.

    Attributes:
        name: What the user asked for: 'host' or 'portable' or a CPU's name, 'cuda' or 'cuda:' and an architecture.
        mcpu: LLVM CPU name; '' for the generic CPU of the architecture.
        isa: Instruction set the kernels are written for; of a GPU's target that of the code which launches them.
        threads: Threads of the CPU a module runs on.
        triple: LLVM triple; '' for that of the machine which compiles.
        arch: Architecture of the GPU, such as 'sm_90'; '' for a CPU.
    """

    name: str
    mcpu: str
    isa: Isa
    threads: int = 1
    triple: str = ""
    arch: str = ""

    @property
    def device(self) -> str:
        """'cpu' or 'cuda', as TVM names it."""
        return "cuda" if self.arch else "cpu"

    @property
    def architecture(self) -> str:
        """'x86_64' or 'aarch64', or what else the machine is."""
        return self.triple.partition("-")[0] or host_architecture()

    @property
    def precisions(self) -> tuple[str, ...]:
        """Names of the precisions that it has kernels for."""
        if not self.arch:
            return ("fp32", "int16", "int8", "w4a8")
        # Conversions of float8 are instructions since compute capability 8.9.
        capability = int(self.arch.removeprefix("sm_"))
        short = ("fp8",) if capability >= 89 else ()
        # Matrix units read float32 since 8.0.
        wide = ("tf32",) if capability >= 80 else ()
        return ("fp32", *wide, "fp16", "int16", "int8", *short, "w4a8")

    @property
    def description(self) -> str:
        """One line for reports and identities."""
        if self.arch:
            return f"cuda -arch={self.arch}"
        where = f" -mtriple={self.triple}" if self.triple else ""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"llvm{where} -mcpu={self.mcpu or 'generic'} ({self.isa.name}, {threads})"

    @property
    def cpu_flags(self) -> list[str]:
        """Vector features the compiled code may use, as the kernel names them in plain spelling (avx512vnni, sse42), sorted."""
        return sorted(_vector_features(self.mcpu, self.triple)) if self.mcpu else []

    def tvm(self) -> object:
        """The TVM target."""
        from tvm.target import Target as TvmTarget

        host = _options(self.mcpu, self.triple) | {"num-cores": self.threads}
        return TvmTarget(_GPU | {"arch": self.arch}, host=host) if self.arch else TvmTarget(host)

    def describe(self, key: OpKey, tile: Tile | None = None) -> Kernel:
        """The kernel that carries out an operation.

        Args:
            key: The operation.
            tile: A tile to use instead of the predicted one; means something where `candidate_tiles` gives some.

        Raises:
            BuildError: There is none.
        """
        if self.arch:
            assert tile is None or isinstance(tile, cuda.Tile)
            return cuda.describe_kernel(key, self.arch, tile)
        assert tile is None or isinstance(tile, cpu.Tile)
        return cpu.describe_kernel(key, self.isa, self.threads, tile)

    def candidate_tiles(self, key: OpKey, count: int) -> Sequence[Tile]:
        """Tiles worth timing for an operation, the predicted best first; none where there is nothing to choose."""
        if self.arch:
            return cuda.candidate_tiles(key, self.arch, count)
        return cpu.candidate_tiles(key, self.isa, self.threads, count)

    def tile(self, values: Mapping[str, Any]) -> Tile:
        """A tile from its fields as JSON has them.

        Raises:
            TypeError: These are not its fields.
        """
        given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cuda.Tile(**given) if self.arch else cpu.Tile(**given)


def host_architecture() -> str:
    """Architecture of this machine, as in an LLVM triple."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


@cache
def host_flags() -> frozenset[str]:
    """Feature flags of this machine's CPU, as the kernel reports them; empty where it does not."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(match.group(1).split()) if match else frozenset()


@cache
def open_target(name: str, threads: int = 1) -> Target:
    """Resolve a target by name; whether this machine can run it is another matter, see `require_runnable`.

    Args:
        name: 'host' (or 'llvm', 'cpu') for this machine; 'portable' for any CPU of its architecture; an LLVM name
            of an x86-64 CPU such as 'icelake-server'; 'aarch64:' and one of an AArch64 CPU, such as
            'aarch64:neoverse-n1'; 'cuda' for this machine's GPU, or 'cuda:' and an architecture, such as 'cuda:sm_90'.
        threads: Threads its modules run on.

    Raises:
        UsageError: LLVM does not know the CPU, or there is no such GPU.
        ToolchainError: There is no CUDA compiler.
    """
    if name == "cuda" or name.startswith("cuda:"):
        return _open_cuda(name)
    if name == "portable":
        return Target(name, "", ISAS[-1], threads)
    if name in ("host", "llvm", "cpu"):
        mcpu = _host_cpu()
        return Target("host", mcpu, _best_isa(mcpu, "", host_architecture()), threads)
    prefix, _, mcpu = name.rpartition(":")
    architecture = prefix or "x86_64"
    triple = "" if architecture == host_architecture() else TRIPLES.get(architecture, "unknown")
    if prefix not in ("", "aarch64") or mcpu not in _known_cpus(triple):
        raise UsageError(
            f"unknown target {name!r}: use 'host', 'portable', an LLVM name of an x86-64 CPU such as 'icelake-server', or "
            "'aarch64:' and one of an AArch64 CPU, such as 'aarch64:neoverse-n1'"
        )
    return Target(name, mcpu, _best_isa(mcpu, triple, architecture), threads, triple)


def _open_cuda(name: str) -> Target:
    from qsearch.build.cuda_toolkit import gpu_architecture, load_cuda_runtime

    load_cuda_runtime()
    arch = name.partition(":")[2] or gpu_architecture()
    if arch is None:
        raise UsageError(
            "target 'cuda' means this machine's GPU, and it has none that can be used (`doctor` says why); to compile for "
            "another machine's, name its architecture, such as cuda:sm_90"
        )
    if arch not in ARCHITECTURES:
        raise UsageError(f"unknown CUDA architecture {arch!r}: expected one of {', '.join(ARCHITECTURES)}")
    return Target(name, "", ISAS[-1], arch=arch)


def require_runnable(target: Target) -> None:
    """Refuse a target whose modules this machine cannot run: they would die of an illegal instruction.

    Raises:
        UsageError: It is of another architecture, has instructions that this machine lacks, or wants more threads.
    """
    if target.arch:
        _require_gpu(target)
        return
    here = {_plain(flag) for flag in host_flags()}
    way_out = "use host (this machine), portable, or run the command on such a machine"
    if target.architecture != host_architecture():
        raise UsageError(
            f"target {target.name!r} is of architecture {target.architecture} and this machine is {host_architecture()}, so its "
            f"modules cannot be measured here; {way_out}"
        )
    missing = [flag for flag in target.cpu_flags if here and flag not in here]
    if missing:
        raise UsageError(
            f"target {target.name!r} has instructions that this machine lacks ({', '.join(missing)}; it has "
            f"{', '.join(_widest(here)) or 'none of their kind'}), so its modules cannot be measured here; {way_out}"
        )
    processors = os.cpu_count() or target.threads
    if target.threads > processors:
        raise UsageError(f"{target.threads} threads are asked for and this machine has {processors} processors; give fewer")


def _require_gpu(target: Target) -> None:
    from qsearch.build.cuda_toolkit import gpu_architecture

    found = gpu_architecture()
    if found == target.arch:
        return
    what = "no GPU that can be used" if found is None else f"a GPU of architecture {found}"
    raise UsageError(
        f"target {target.name!r} needs a GPU of architecture {target.arch} to be measured on, and this machine has {what}. Run "
        f"the same command where there is one, or measure the kernels there: `pack --target cuda:{target.arch} --out FILE` here, "
        "`measure-pack FILE` there, and `--cost-table` with its result here"
    )


def _widest(flags: set[str]) -> list[str]:
    """Those flags that some instruction set of qsearch's asks for."""
    known = {ARM_FLAGS.get(feature, feature) for isa in ISAS for feature in isa.features}
    return sorted(known & flags)


def _options(mcpu: str, triple: str) -> dict[str, object]:
    options: dict[str, object] = {"kind": "llvm"}
    return options | ({"mcpu": mcpu} if mcpu else {}) | ({"mtriple": triple} if triple else {})


@cache
def _known_cpus(triple: str) -> frozenset[str]:
    from tvm.target import Target as TvmTarget
    from tvm.target.codegen import llvm_get_cpu_archlist

    return frozenset() if triple == "unknown" else frozenset(llvm_get_cpu_archlist(TvmTarget(_options("", triple))))


def _best_isa(mcpu: str, triple: str, architecture: str) -> Isa:
    """The first instruction set whose features the CPU has."""
    from tvm.target import Target as TvmTarget
    from tvm.target.codegen import llvm_cpu_has_features

    described = TvmTarget(_options(mcpu, triple))
    fitting = (isa for isa in ISAS if isa.architecture in ("", architecture))
    return next(isa for isa in fitting if not isa.features or llvm_cpu_has_features(list(isa.features), described))


def _host_cpu() -> str:
    """The most specific CPU name whose vector features this machine really has."""
    from tvm.target.codegen import llvm_get_system_cpu

    flags = {_plain(flag) for flag in host_flags()}
    names = (llvm_get_system_cpu(), *(FALLBACK_CPUS if host_architecture() == "x86_64" else ()))
    return next((mcpu for mcpu in names if not flags or _vector_features(mcpu, "") <= flags), "")


@cache
def _vector_features(mcpu: str, triple: str) -> frozenset[str]:
    from tvm.target import Target as TvmTarget
    from tvm.target.codegen import llvm_get_cpu_features

    features = {str(feature) for feature in llvm_get_cpu_features(TvmTarget(_options(mcpu, triple)))}
    if (triple.partition("-")[0] or host_architecture()) == "aarch64":
        return frozenset(ARM_FLAGS[feature] for feature in features & ARM_FLAGS.keys())
    return frozenset(_plain(feature) for feature in features if CHECKED_FEATURES.match(feature))


def _plain(feature: str) -> str:
    """LLVM and the kernel spell features differently: avx512vnni and avx512_vnni, sse4.2 and sse4_2."""
    return re.sub(r"[._-]", "", feature)
