"""Targets: what machine a module is compiled for, and which instruction set its kernels use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qsearch.errors import UsageError
from qsearch.kernels.cpu import ISAS, Isa

__all__ = ["Target", "host_flags", "open_target"]

# Tried in order after the machine's own name: the x86-64 micro-architecture levels, then anything.
FALLBACK_CPUS = ("x86-64-v4", "x86-64-v3", "x86-64-v2")
# Feature families whose absence under a hypervisor must change the choice of the CPU name.
CHECKED_FEATURES = re.compile(r"avx|fma|sse4|f16c")


@dataclass(frozen=True)
class Target:
    """A CPU to compile for.

    Attributes:
        name: What the user asked for: 'host' or 'portable' or an LLVM CPU name.
        mcpu: LLVM CPU name; '' for the generic CPU of the architecture.
        isa: Instruction set the kernels are written for.
        threads: Threads a module runs on.
    """

    name: str
    mcpu: str
    isa: Isa
    threads: int = 1

    @property
    def description(self) -> str:
        """One line for reports and identities."""
        return f"llvm -mcpu={self.mcpu or 'generic'} ({self.isa.name}, {self.threads} thread)"

    @property
    def cpu_flags(self) -> list[str]:
        """Vector features the compiled code may use, in plain spelling (avx512vnni, sse42), sorted."""
        return sorted(_vector_features(self.mcpu)) if self.mcpu else []

    def tvm(self) -> object:
        """The TVM target."""
        from tvm.target import Target as TvmTarget

        options: dict[str, object] = {"kind": "llvm", "num-cores": self.threads}
        return TvmTarget(options | ({"mcpu": self.mcpu} if self.mcpu else {}))


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
    """Resolve a target by name.

    Args:
        name: 'host' (or 'llvm', 'cpu') for this machine; 'portable' for any CPU of its architecture; else an
            LLVM CPU name such as 'icelake-server'.
        threads: Threads its modules run on.

    Raises:
        UsageError: LLVM does not know the CPU.
    """
    from tvm.target import Target as TvmTarget
    from tvm.target.codegen import llvm_cpu_has_features, llvm_get_cpu_archlist

    if name == "portable":
        return Target(name, "", ISAS[-1], threads)
    if name in ("host", "llvm", "cpu"):
        name, mcpu = "host", _host_cpu()
    elif name in llvm_get_cpu_archlist(TvmTarget({"kind": "llvm"})):
        mcpu = name
    else:
        raise UsageError(f"unknown target {name!r}: use 'host', 'portable' or an LLVM CPU name such as 'icelake-server'")
    described = TvmTarget({"kind": "llvm", "mcpu": mcpu}) if mcpu else TvmTarget({"kind": "llvm"})
    isa = next(isa for isa in ISAS if not isa.features or llvm_cpu_has_features(list(isa.features), described))
    return Target(name, mcpu, isa, threads)


def _host_cpu() -> str:
    """The most specific CPU name whose vector features this machine really has."""
    from tvm.target.codegen import llvm_get_system_cpu

    flags = {_plain(flag) for flag in host_flags()}
    for mcpu in (llvm_get_system_cpu(), *FALLBACK_CPUS):
        if not flags or _vector_features(mcpu) <= flags:
            return mcpu
    return ""


def _vector_features(mcpu: str) -> set[str]:
    from tvm.target import Target as TvmTarget
    from tvm.target.codegen import llvm_get_cpu_features

    features = llvm_get_cpu_features(TvmTarget({"kind": "llvm", "mcpu": mcpu}))
    return {_plain(feature) for feature in features if CHECKED_FEATURES.match(feature)}


def _plain(feature: str) -> str:
    """LLVM and the kernel spell features differently: avx512vnni and avx512_vnni, sse4.2 and sse4_2."""
    return re.sub(r"[._-]", "", feature)
