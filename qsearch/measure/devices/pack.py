"""Write a pack: the kernels of a search space in one file, which checks and times them wherever their device is.

The file is a zip that Python runs. Nothing of it needs the device, so that it can be made on any machine.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import qsearch
from qsearch.build.link import Linker
from qsearch.build.object_cache import compiler_for, link_for
from qsearch.build.target import Target
from qsearch.errors import BuildError, UsageError
from qsearch.measure.devices import pack_runner
from qsearch.measure.devices.kernel_cases import KernelCase, as_json, kernel_cases
from qsearch.quantize.lower_nodes import scalars
from qsearch.quantize.program import Op, OpKey, Program, Value
from qsearch.seal import seal_of
from qsearch.whole_files import put_in_place

__all__ = ["PackRequest", "chain_program", "target_json", "write_pack"]

# Calls of an almost empty kernel in two modules: their times tell what a call costs in a module, and what an inference does.
CHAINS = (1, 65)
CHAIN_SHAPE = (1, 1, 1, 16)
# Members of one zip are as old as the format can say: the same kernels give the same bytes.
OLDEST = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class PackRequest:
    """What a pack is made of.

    Attributes:
        model: What the user calls the model.
        linker: Of the target, with a cache that need not load what it compiles.
        programs: That between them have all kernels.
        tiles: Register tiles of every dense convolution.
    """

    model: str
    linker: Linker
    programs: Iterable[Program]
    tiles: int = 1


def write_pack(request: PackRequest, file: Path, progress: Callable[[str], None] = lambda clause: None) -> dict[str, int]:
    """Write a pack.

    Args:
        request: What it is made of.
        file: Where; replaced whole or not at all.
        progress: Called whenever a slow step begins.

    Returns:
        kernels, bytes, and kernels that do not compile (left_out).

    Raises:
        BuildError: Not even the plainest kernel compiles.
        ToolchainError: There is no linker for the target.
        UsageError: The file cannot be written.
    """
    linker = request.linker
    compiler_for(linker.target)
    chain = chain_program(1)
    cases = list(kernel_cases(linker, [chain, *request.programs], request.tiles))
    progress(f"compiling {len(cases)} kernels for {linker.target.description}")
    kept = _compilable(linker, cases, progress)
    try:
        with tempfile.TemporaryDirectory(dir=file.absolute().parent, prefix=".pack-") as name:
            scratch = Path(name)
            writer = _Writer(zipfile.ZipFile(scratch / "pack.zip", "w", zipfile.ZIP_DEFLATED))
            manifest = _fill(writer, request, kept, chain, scratch)
            writer.finish(manifest)
            put_in_place(scratch / "pack.zip", file.absolute())
    except OSError as error:
        raise UsageError(f"cannot write the pack {file}: {error.strerror or error}; give another --out") from error
    return {"kernels": len(kept), "bytes": file.stat().st_size, "left_out": len(cases) - len(kept)}


def chain_program(calls: int) -> Program:
    """A program that calls a kernel with next to nothing to do, again and again."""
    key = OpKey("activation", (CHAIN_SHAPE, CHAIN_SHAPE), ("float32", "float32"), function="clip")
    names = ["x", *(f"v{i}" for i in range(calls - 1)), "y"]
    values = [Value(name, CHAIN_SHAPE, "float32") for name in names]
    ops = (Op(f"op{i}", key, (names[i],), values[i + 1], scalars()) for i in range(calls))
    return Program(values[0], tuple(ops), values[-1])


def target_json(target: Target) -> dict[str, Any]:
    """What a pack, and the table that is measured with it, say of their target."""
    return {
        "name": _portable_name(target),
        "device": target.device,
        "architecture": target.architecture,
        "arch": target.arch,
        "threads": target.threads,
        "description": target.description,
        "cpu_flags": target.cpu_flags,
    }


def _portable_name(target: Target) -> str:
    """A name that means the same target on every machine."""
    if target.arch:
        return f"cuda:{target.arch}"
    if target.name != "host":
        return target.name
    if not target.mcpu:
        return "portable"
    return target.mcpu if target.architecture == "x86_64" else f"{target.architecture}:{target.mcpu}"


def _compilable(linker: Linker, cases: list[KernelCase], progress: Callable[[str], None]) -> list[KernelCase]:
    """The cases whose kernels compile: a tile that does not is no reason to go without the others."""
    try:
        linker.cache.get((case.symbol, case.kernel) for case in cases)
        return cases
    except BuildError:
        kept, first = [], True
        for case in cases:
            try:
                linker.cache.get([(case.symbol, case.kernel)])
                kept.append(case)
            except BuildError as error:
                if first:
                    raise
                progress(f"left out: {error}")
            first = False
        return kept


class _Writer:
    """A zip archive whose members are named by their content, each written once."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive, self.digests = archive, dict[str, str]()

    def add(self, name: str, data: bytes) -> None:
        self.digests[name] = hashlib.sha256(data).hexdigest()
        self._write(name, data)

    def array(self, array: np.ndarray) -> str:
        """Keep an array; returns its member's name."""
        stream = io.BytesIO()
        np.save(stream, array, allow_pickle=False)
        data = stream.getvalue()
        name = f"data/{hashlib.sha256(data).hexdigest()[:24]}.npy"
        if name not in self.digests:
            self.add(name, data)
        return name

    def finish(self, manifest: dict[str, Any]) -> None:
        manifest = manifest | {"sha256": self.digests}
        own = pack_runner.own_digest(manifest)
        # A comment is no member: what a pack holds is what its manifest lists.
        self.archive.comment = (seal_of(pack_runner.KIND, own) or "").encode("ascii")
        self._write("manifest.json", json.dumps(manifest | {"self_sha256": own}, indent=1).encode())
        self.archive.close()

    def _write(self, name: str, data: bytes) -> None:
        self.archive.writestr(zipfile.ZipInfo(name, OLDEST), data, zipfile.ZIP_DEFLATED)


def _fill(writer: _Writer, request: PackRequest, cases: list[KernelCase], chain: Program, scratch: Path) -> dict[str, Any]:
    import tvm

    linker = request.linker
    compiled = linker.cache.get((case.symbol, case.kernel) for case in cases)
    writer.add("__main__.py", Path(pack_runner.__file__).read_bytes())
    library = "kernels/kernels.so"
    link_for(linker.target, scratch / "kernels.so", [compiled[case.symbol] for case in cases])
    writer.add(library, (scratch / "kernels.so").read_bytes())
    chains = {}
    for calls in CHAINS:
        module, name = linker.build(chain_program(calls), linked=False, exported=True), f"chain{calls}.so"
        module.executable.export_library(str(scratch / name), addons=module.addons, cc=compiler_for(linker.target))
        writer.add(f"kernels/{name}", (scratch / name).read_bytes())
        chains[f"kernels/{name}"] = calls
    kernels = [
        as_json(case)
        | {
            "library": library,
            "arguments": [writer.array(one) for one in case.arguments],
            "expected": writer.array(case.expected),
        }
        for case in cases
    ]
    symbol = linker.plan(chain).calls[0].symbol
    return {
        "schema": pack_runner.SCHEMA,
        "model": request.model,
        "target": target_json(linker.target),
        "made_by": {"qsearch": qsearch.__version__},
        "versions": {"tvm": tvm.__version__},
        "kernels": kernels,
        "chain": {"symbol": symbol, "calls": chains, "shape": list(CHAIN_SHAPE)},
    }
