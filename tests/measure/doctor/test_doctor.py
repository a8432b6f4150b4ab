"""What `doctor` finds on this machine, and what it would say of machines that lack something."""

from __future__ import annotations

import ctypes
import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from real_search import fails, within

from qsearch.build.cuda_toolkit import CudaCompiler
from qsearch.errors import ToolchainError
from qsearch.measure.doctor import cuda, host
from qsearch.measure.doctor.check import Check, attempted
from qsearch.measure.doctor.cuda import Driver, check_driver, check_toolkit, open_driver


def test_the_path_that_the_tests_take_works(tmp_path: Path) -> None:
    result = within(tmp_path, "doctor", "--json")
    assert result.returncode == 0, result.stdout
    document = json.loads(result.stdout)
    checks = {one["name"]: one for one in document["checks"]}
    assert document["host_works"] is True
    assert {"Python", "apache-tvm", "apache-tvm-ffi", "torch", "C++ compiler", "test kernel", "disk", "processors"} <= set(checks)
    assert "compiled, linked and run" in checks["test kernel"]["found"]
    assert all(one["state"] == "ok" for one in document["checks"] if one["part"] == "host")
    assert all(one["state"] != "problem" or one["remedy"] for one in document["checks"])
    assert {"NVIDIA driver", "CUDA compiler"} <= set(checks)


def test_what_is_missing_for_cuda_is_a_problem_only_if_it_was_asked_about(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "open_driver", lambda: "no driver is installed")
    assert {one.state for one in cuda.check_cuda("llvm") if one.name == "NVIDIA driver"} == {"absent"}
    (driver,) = (one for one in cuda.check_cuda("cuda:sm_90") if one.name == "NVIDIA driver")
    assert driver.state == "problem" and "qsearch pack" in driver.remedy


def test_a_target_that_does_not_run_here(tmp_path: Path) -> None:
    result = within(tmp_path, "doctor", "--target", "aarch64:neoverse-v1" if not _is_arm() else "haswell")
    assert result.returncode == 1 and "cannot be measured here" in " ".join(result.stdout.split())
    fails(tmp_path, 2, ("unknown target",), "doctor", "--target", "abacus")


def _is_arm() -> bool:
    from qsearch.build.target import host_architecture

    return host_architecture() == "aarch64"


def test_versions_and_the_compiler(monkeypatch) -> None:
    monkeypatch.setattr(host, "version", {"a": "1.0", "b": "2.13.0+cpu"}.__getitem__)
    assert host.check_package("a", "1.0").state == host.check_package("b", "2.13.0").state == "ok"
    wrong = host.check_package("a", "2.0")
    assert (wrong.state, wrong.found, wrong.remedy) == ("problem", "1.0, expected 2.0", "pip install 'a==2.0'")

    def nothing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(host, "version", nothing)
    assert host.check_package("a", None) == Check("a", "problem", "not installed", "pip install 'a'")
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert host.check_compiler().state == "problem"


def test_a_full_disk(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "ROOM_BYTES", 10**18)
    full = host.check_room(tmp_path / "not" / "there")
    assert full.state == "problem" and str(tmp_path) in full.found and "free some space" in full.remedy


def test_whatever_fails_is_a_finding() -> None:
    found = attempted("a thing", "do something", lambda: str(1 // 0))
    assert (found.state, found.remedy) == ("problem", "do something") and "division" in found.found


class FakeCuda:
    """A driver with one device."""

    def __init__(self, status: int = 0, count: int = 1) -> None:
        self.status, self.count = status, count

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDriverGetVersion(self, number) -> None:
        number._obj.value = 12040

    def cuDeviceGetCount(self, count) -> None:
        count._obj.value = self.count

    def cuDeviceGet(self, handle, index: int) -> None:
        handle._obj.value = index

    def cuDeviceGetName(self, name, size: int, handle) -> None:
        name.value = b"NVIDIA H100"

    def cuDeviceTotalMem_v2(self, memory, handle) -> None:
        memory._obj.value = 80 * 2**30

    def cuDeviceGetAttribute(self, value, which: int, handle) -> None:
        values = {cuda.MAJOR: 9, cuda.MINOR: 0, cuda.CLOCK_KHZ: 1980000, cuda.MEMORY_CLOCK_KHZ: 2619000}
        ctypes.pointer(value._obj).contents.value = values[which]


def test_a_driver_and_its_device() -> None:
    driver = open_driver(lambda name: FakeCuda())
    assert driver == Driver((12, 4), ("NVIDIA H100, sm_90, 80.0 GiB, clocks up to 1.98 GHz, memory 2.62 GHz",), ("sm_90",))
    names = [(one.name, one.state) for one in check_driver(driver, "problem")]
    assert names == [("NVIDIA driver", "ok"), ("GPU 0", "ok")]
    none = open_driver(lambda name: FakeCuda(count=0))
    assert [one.state for one in check_driver(none, "absent")] == ["ok", "absent"]
    assert "cuInit returns 100" in str(open_driver(lambda name: FakeCuda(status=100)))

    def missing(name: str) -> None:
        raise OSError(name)

    assert "no driver" in str(open_driver(missing))


@pytest.mark.parametrize(
    ("driver", "toolkit", "fits"), [((12, 4), (13, 0), False), ((13, 0), (13, 0), True), ((13, 0), (12, 9), True)]
)
def test_a_driver_that_is_older_than_the_toolkit(monkeypatch, driver, toolkit, fits) -> None:
    monkeypatch.setattr(cuda, "find_compiler", lambda: CudaCompiler("nvrtc", "libnvrtc.so.13", toolkit))
    found = check_toolkit(Driver(driver, (), ()), "problem")
    assert [one.state for one in found] == (["ok"] if fits else ["ok", "problem"])
    assert fits or "nvidia-cuda-nvrtc<13" in found[-1].remedy

    def none() -> None:
        raise ToolchainError("no CUDA compiler found: install one")

    monkeypatch.setattr(cuda, "find_compiler", none)
    assert [(one.state, one.remedy) for one in check_toolkit(None, "absent")] == [("absent", "install one")]
