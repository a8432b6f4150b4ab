"""What every place where modules are timed has in common, and what it is given: a module that is ready."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from qsearch.measure.latency import TimingSettings
from qsearch.measure.measurement import Latency, Memory
from qsearch.quantize.program import Program

if TYPE_CHECKING:
    # Load TVM.
    from qsearch.build.link import Linker
    from qsearch.build.target import Target

__all__ = ["Away", "Device", "Prepared"]


@dataclass(frozen=True)
class Prepared:
    """A linked module, ready to be measured.

    Attributes:
        open: Makes a virtual machine of it, on this machine: what it computes is looked at here.
        memory: The bytes it needs where it is timed.
        kernels_sha256: Digest of the kernels that it is timed with.
        seconds: Wall time of lower and build.
        away: What a device elsewhere knows it by; None where it is timed here.
    """

    open: Callable[[], Any]
    memory: Memory
    kernels_sha256: str
    seconds: dict[str, float] = field(default_factory=dict)
    away: Any = None


class Device(Protocol):
    """Where modules are timed. A handle stands for a module there; what it is, each device knows by itself."""

    def handle(self, prepared: Prepared) -> Any:
        """Bring a module there.

        Raises:
            TrialError: It cannot be brought or run there.
        """
        ...

    def alone(self, handle: Any, image: np.ndarray, settings: TimingSettings) -> Latency:
        """Time one module."""
        ...

    def paired(self, reference: Any, handles: Sequence[Any], image: np.ndarray, reference_ms: float) -> list[Latency]:
        """Time modules in turns with a reference, on whose clock their latencies are told."""
        ...


class Away(Protocol):
    """A device that is not this machine: how modules are got ready for it."""

    @property
    def target(self) -> Target:
        """What is compiled for."""
        ...

    @property
    def linker(self) -> Linker:
        """Names kernels and plans memory for the target."""
        ...

    @property
    def description(self) -> str:
        """Device and source of the figures, for identities and reports."""
        ...

    @property
    def device(self) -> Device:
        """Where modules are timed."""
        ...

    def require(self, program: Program) -> None:
        """Refuse to begin where not even this program, float, can be timed.

        Raises:
            UsageError: It cannot.
        """
        ...

    def prepare(self, program: Program) -> Any:
        """What the device needs of a program, for `Prepared.away`.

        Raises:
            BuildError: It cannot be built, or not all that is needed of it is known.
        """
        ...

    def learn(self, programs: Iterable[Program]) -> None:
        """Find out what the kernels of some programs take there, where that is not known yet."""
        ...

    def seconds(self, symbol: str) -> float | None:
        """What a kernel's call adds to a module there, seconds; None where it is not known."""
        ...
