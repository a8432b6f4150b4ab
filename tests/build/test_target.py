"""Targets: what a name means, and what this machine refuses to run."""

import pytest

from qsearch.build import target
from qsearch.build.target import open_target, require_runnable
from qsearch.errors import UsageError


@pytest.fixture
def machine(monkeypatch):
    """Make this machine another one."""

    def become(architecture: str, *flags: str, processors: int = 4) -> None:
        monkeypatch.setattr(target, "host_architecture", lambda: architecture)
        monkeypatch.setattr(target, "host_flags", lambda: frozenset(flags))
        monkeypatch.setattr("os.cpu_count", lambda: processors)

    return become


AVX2 = ("sse4_1", "sse4_2", "avx", "avx2", "fma", "f16c")


@pytest.mark.parametrize(
    ("name", "isa"),
    [
        ("icelake-server", "avx512vbmi"),
        ("cascadelake", "avx512vnni"),
        ("skylake-avx512", "avx512"),
        ("alderlake", "avxvnni"),
        ("haswell", "avx2"),
        ("x86-64-v2", "portable"),
        ("portable", "portable"),
        ("aarch64:neoverse-v1", "neoni8mm"),
        ("aarch64:neoverse-n1", "neondot"),
        ("aarch64:cortex-a53", "neon"),
    ],
)
def test_instruction_set_follows_from_the_name(name, isa):
    assert open_target(name).isa.name == isa


@pytest.mark.parametrize("name", ["pentium-ix", "", "neoverse-n1", "aarch64:haswell", "aarch64:", "sparc:niagara"])
def test_an_unknown_target_is_refused(name):
    with pytest.raises(UsageError, match=f"{name!r}.*portable.*aarch64:"):
        open_target(name)


def test_instructions_that_the_machine_lacks(machine):
    machine("x86_64", *AVX2)
    for name in ("haswell", "x86-64-v2", "portable"):
        require_runnable(open_target(name))
    with pytest.raises(UsageError, match=r"'icelake-server'.*avx512vnni.*it has avx2, fma\).*host"):
        require_runnable(open_target("icelake-server"))
    machine("x86_64", "sse4_1")
    with pytest.raises(UsageError, match=r"'haswell'.*it has none"):
        require_runnable(open_target("haswell"))
    machine("x86_64")
    # Where the kernel reports nothing, nothing is known to be missing.
    require_runnable(open_target("icelake-server"))


def test_another_architecture(machine):
    machine("x86_64", *AVX2)
    graviton = open_target("aarch64:neoverse-n1")
    with pytest.raises(UsageError, match=r"'aarch64:neoverse-n1' is of architecture aarch64 and this machine is x86_64"):
        require_runnable(graviton)
    flags = ("asimd", "asimddp", "asimdhp", "asimdrdm", "atomics")
    machine("aarch64", *flags)
    assert graviton.cpu_flags == sorted(flags)
    require_runnable(graviton)
    with pytest.raises(UsageError, match=r"'aarch64:neoverse-v1'.*i8mm.*it has asimd, asimddp\)"):
        require_runnable(open_target("aarch64:neoverse-v1"))


def test_threads(machine):
    machine("x86_64", *AVX2, processors=2)
    assert "2 threads" in open_target("haswell", 2).description
    require_runnable(open_target("haswell", 2))
    with pytest.raises(UsageError, match="3 threads.*2 processors"):
        require_runnable(open_target("haswell", 3))


def test_a_hypervisor_that_hides_instructions(machine):
    """The CPU's name says AVX512, the machine has none: the host is what the machine has."""
    if target.host_architecture() != "x86_64":
        pytest.skip("names of x86 CPUs")
    machine("x86_64", *AVX2)
    host = open_target.__wrapped__("host")
    assert host.isa.name == "avx2"
    require_runnable(host)
