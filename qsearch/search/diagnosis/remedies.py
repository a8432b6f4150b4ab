"""Remedies measured: each is lowered, compiled and run on the search images, paired with what it is to help."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from qsearch.config import QuantConfig
from qsearch.errors import TrialError
from qsearch.measure.latency import measure_paired
from qsearch.measure.measurement import Accuracy, Memory
from qsearch.measure.memory import measure_memory
from qsearch.quantize.program import Program
from qsearch.search.diagnosis.candidates import Candidate, together
from qsearch.search.evaluation.model_evaluator import ModelEvaluator

__all__ = ["Measured", "Remedies", "Remedy", "measure", "measure_remedies", "nats"]

PART = "search"


@dataclass(frozen=True, eq=False)
class Measured:
    """A configuration's module.

    Attributes:
        logits: float32 (N, classes) on the search images.
        accuracy: Against float.
        memory: Bytes.
        machine: Runs it.
    """

    logits: np.ndarray
    accuracy: Accuracy
    memory: Memory
    machine: Any


@dataclass(frozen=True)
class Remedy:
    """What a change of the configuration gave.

    Attributes:
        candidate: The change.
        accuracy: With it, against float.
        gain_pp: Top-1 that it gained over the configuration, percentage points.
        gain_ci_pp: 95 % interval of the gain, paired image by image.
        latency_ratio: Latency with it over that without, timed in turns.
        memory: Bytes with it.
        not_best: Whether the best remedy gains more, beyond what chance explains (95 %).
    """

    candidate: Candidate
    accuracy: Accuracy
    gain_pp: float
    gain_ci_pp: tuple[float, float]
    latency_ratio: float
    memory: Memory
    not_best: bool = False

    @property
    def helps(self) -> bool:
        """Whether it gains beyond what chance explains (95 %)."""
        return self.gain_ci_pp[0] > 0

    @property
    def effort(self) -> tuple[bool, bool]:
        """Whether it raises precisions, and whether it is more than one change: what to prefer where gains are equal."""
        return self.candidate.kind == "precision", self.candidate.kind == "together"


@dataclass
class Remedies:
    """What became of all candidates.

    Attributes:
        measured: The measured ones, those that gain most first.
        unchanged: Names of those that change nothing for this configuration.
        skipped: Names of those that the time did not suffice for.
        failed: Name -> why it could not be built.
    """

    measured: list[Remedy] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def measure(evaluator: ModelEvaluator, program: Program) -> Measured:
    """Compile a program and run it on the search images.

    Raises:
        TrialError: It cannot be built or run.
    """
    module = evaluator.build(program)
    logits = evaluator.logits(module, PART)
    return Measured(logits, _score(evaluator, logits, evaluator.float_logits(PART)), measure_memory(module), module.open())


def _score(evaluator: ModelEvaluator, logits: np.ndarray, against: np.ndarray) -> Accuracy:
    return evaluator.scorer(PART).compare(logits, against)


def nats(accuracy: Accuracy) -> float:
    """How far outputs are from float's; known of everything that is measured now."""
    assert accuracy.divergence is not None
    return accuracy.divergence


class _Trials:
    """Measures candidates against one configuration."""

    def __init__(self, evaluator: ModelEvaluator, config: QuantConfig, before: Measured, deadline: float) -> None:
        self.evaluator, self.before, self.deadline = evaluator, before, deadline
        self.known = {_digest(evaluator.lower(config))}
        self.taken_s: list[float] = []
        self.found = Remedies()
        self.logits: dict[str, np.ndarray] = {}

    def add(self, candidate: Candidate) -> None:
        """Measure a candidate, unless there is no time for it or it changes nothing."""
        start = time.monotonic()
        # What a remedy has to compile is not known beforehand: it is taken to be like those before it.
        if start + float(np.mean(self.taken_s or [0.0])) > self.deadline:
            self.found.skipped.append(candidate.name)
            return
        try:
            program = self.evaluator.lower(candidate.config)
            digest = _digest(program)
            if digest in self.known:
                self.found.unchanged.append(candidate.name)
                return
            self.known.add(digest)
            self.found.measured.append(self._remedy(candidate, program))
        except TrialError as error:
            self.found.failed[candidate.name] = str(error)
        self.taken_s.append(time.monotonic() - start)

    def _remedy(self, candidate: Candidate, program: Program) -> Remedy:
        after = measure(self.evaluator, program)
        # Scored as if what it is to help were the module, and it float: what that one loses, it gains.
        gained = _score(self.evaluator, self.before.logits, after.logits)
        image, threads = self.evaluator.timed_images(PART), self.evaluator.target.threads
        (latency,) = measure_paired(self.before.machine, [after.machine], image, 1.0, threads=threads)
        self.logits[candidate.name] = after.logits
        gain, interval = gained.top1_loss_pp, gained.top1_loss_ci_pp
        assert latency.ratio is not None
        return Remedy(candidate, after.accuracy, gain, interval, latency.ratio, after.memory)

    def ranked(self) -> list[Remedy]:
        """The remedies measured so far, those that gain most first; of equal ones the least effort, then the nearest to float."""
        order = sorted(self.found.measured, key=lambda one: (-one.gain_pp, one.effort, nats(one.accuracy)))
        if not order:
            return []
        best = self.logits[order[0].candidate.name]
        return [self._compared(one, best) for one in order]

    def _compared(self, remedy: Remedy, best: np.ndarray) -> Remedy:
        lost = _score(self.evaluator, self.logits[remedy.candidate.name], best)
        return replace(remedy, not_best=lost.top1_loss_ci_pp[0] > 0)


def measure_remedies(
    evaluator: ModelEvaluator, config: QuantConfig, before: Measured, tried: Sequence[Candidate], deadline: float
) -> Remedies:
    """Measure candidates one after the other, and those that helped all at once, as far as the time suffices.

    Args:
        evaluator: The model, its images and the target.
        config: The configuration that they are to help.
        before: Its module.
        tried: The candidates.
        deadline: None is begun that would end later if it took as long as those before it; by time.monotonic().

    Returns:
        What became of them.
    """
    trials = _Trials(evaluator, config, before, deadline)
    for number, candidate in enumerate(tried, 1):
        evaluator.progress(f"remedy {number} of {len(tried)}: {candidate.name}")
        trials.add(candidate)
    near = nats(before.accuracy)
    helped = [one.candidate for one in trials.ranked() if one.gain_pp >= 0 and nats(one.accuracy) < near]
    if (combined := together(config, helped)) is not None:
        evaluator.progress(f"remedies {combined.name}")
        trials.add(combined)
    trials.found.measured = trials.ranked()
    return trials.found


def _digest(program: Program) -> str:
    """Two programs with one digest compute the same."""
    digest = hashlib.sha256()
    for op in program.ops:
        digest.update(repr((op.name, op.key, op.inputs, op.output)).encode())
        for name in sorted(op.constants):
            digest.update(name.encode() + np.ascontiguousarray(op.constants[name]).tobytes())
    return digest.hexdigest()
