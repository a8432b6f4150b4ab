"""What is known of one compiled module after it was measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

__all__ = ["MEAN_AVERAGE_PRECISION", "TOP1", "Accuracy", "Latency", "Measurement", "Memory", "Source", "Task"]

Task = Literal["classification", "detection"]
"""What a model is for."""

Source = Literal["measured", "modelled"]
"""Where a latency comes from."""

TOP1, MEAN_AVERAGE_PRECISION = "top-1", "mAP"
# What the second figure of each metric is called.
_SECOND = {TOP1: "top-5", MEAN_AVERAGE_PRECISION: "mAP@50"}


@dataclass(frozen=True)
class Latency:
    """Time of one inference.

    A latency that was paired with a reference module is told on the reference's clock, see
    `qsearch.measure.latency.measure_paired`; how long the module itself took is `raw_ms`.

    Attributes:
        median_ms: Median over the repeats, milliseconds; where paired, the reference latency times `ratio`.
        spread_ms: Half the interquartile range over the repeats, milliseconds; where paired, that of the ratios times
            the reference latency.
        repeats: Number of repeats; each is the mean of `number` inferences.
        number: Inferences per repeat.
        threads: Threads the module ran on.
        ratio: Median of the paired ratios of this module's time to the reference's; None where it was timed alone.
        raw_ms: Median over the repeats of a paired module's own time, milliseconds; None where it was timed alone.
        noisy: Whether the paired ratios spread further than can be relied on, longer try included.
        source: 'measured', or 'modelled': the sum of what the kernels took by themselves on the device.
    """

    median_ms: float
    spread_ms: float
    repeats: int
    number: int
    threads: int = 1
    ratio: float | None = None
    raw_ms: float | None = None
    noisy: bool = False
    source: Source = "measured"

    @property
    def slowdown(self) -> float:
        """How much slower the machine was than when the reference was timed by itself; 1.0 where that is not known."""
        return 1.0 if self.raw_ms is None else self.raw_ms / self.median_ms


@dataclass(frozen=True)
class Memory:
    """Bytes a module needs to run.

    Attributes:
        weight_bytes: Constants of the module.
        activation_bytes: Storage planned for intermediate values, input and output included.
        workspace_bytes: Largest scratch buffer a kernel allocates.
    """

    weight_bytes: int
    activation_bytes: int
    workspace_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Sum of the three."""
        return self.weight_bytes + self.activation_bytes + self.workspace_bytes


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of a module against float on the same images.

    Of a detector, told by `metric`, the same fields hold the mean average precision, 100 times as large.

    Attributes:
        top1: Percent of images whose best class is right; of a detector mAP at overlaps from 0.5 to 0.95.
        top5: Percent of images whose label is among the best five; of a detector mAP at an overlap of 0.5.
        top1_loss_pp: Float's top-1, or mAP, minus this module's, percentage points.
        top1_loss_ci_pp: 95 % interval of the loss, paired image by image.
        images: Number of images.
        output_sha256: Digest of every output byte, in image order.
        divergence: Mean Kullback-Leibler divergence of this module's class probabilities from float's, nats; None in
            records of older versions.
        metric: What `top1` is for a person: top-1 or mAP.
    """

    top1: float
    top5: float
    top1_loss_pp: float
    top1_loss_ci_pp: tuple[float, float]
    images: int
    output_sha256: str
    divergence: float | None = None
    metric: str = TOP1

    @property
    def second_metric(self) -> str:
        """What `top5` is for a person."""
        return _SECOND[self.metric]


@dataclass(frozen=True)
class Measurement:
    """One trial's result.

    Attributes:
        latency: Time.
        memory: Bytes.
        accuracy: On the search images.
        seconds: Wall time of the steps: lower, build, latency, accuracy.
        kernels_sha256: Digest of the kernels that the module calls; '' where it was not recorded.
    """

    latency: Latency
    memory: Memory
    accuracy: Accuracy
    seconds: dict[str, float] = field(default_factory=dict)
    kernels_sha256: str = ""

    def to_json(self) -> dict:
        """Plain types, for user attributes and reports."""
        return asdict(self) | {"peak_bytes": self.memory.peak_bytes}
