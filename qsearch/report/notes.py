"""What the dashboard shows of a trial besides its numbers: a note in Markdown and a picture of the precisions."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import optuna
from optuna.trial import TrialState

from qsearch.config import QuantConfig
from qsearch.measure.measurement import Measurement
from qsearch.models.graph import Graph
from qsearch.qtype import UNSCALED
from qsearch.report.artifacts import attach_picture, remove_orphans
from qsearch.report.pictures import byte_text, draw_precisions, layer_bars
from qsearch.search.locks import TurnLost
from qsearch.search.storage import artifact_folder
from qsearch.search.study import StudyHandle
from qsearch.search.study_trials import finished
from qsearch.whole_files import make_folder

__all__ = ["TrialNotes", "calibration_text", "note_text", "write_note", "write_study_note"]

# The dashboard joins pieces of at most this many characters; databases may bound the length of an attribute.
PIECE = 2045
# Tells a note written here from one that the study's user has written or changed.
_OWN_NOTE = "qsearch:note_sha256"


class TrialNotes:
    """Writes the note and the picture of each measured trial.

    An instance is what the search driver calls before it finishes a trial; a finished one takes no more artifacts.
    """

    def __init__(self, handle: StudyHandle, graph: Graph, baseline: Measurement) -> None:
        """Prepare the artifact store beside the study.

        Args:
            handle: The study.
            graph: The model's layers.
            baseline: The float module.
        """
        self._graph = graph
        self._baseline = baseline
        self._folder = artifact_folder(handle.name, handle.url)
        # In a turn, nobody begins a trial meanwhile; where none is under way, nobody else writes pictures.
        with suppress(TurnLost), handle.turn():
            make_folder(self._folder)
            if not finished(handle.study, TrialState.RUNNING):
                remove_orphans(self._folder, handle.study)

    def __call__(self, trial: optuna.Trial, config: QuantConfig, measurement: Measurement) -> None:
        """Upload the picture and write the note of one trial."""
        study = trial.study
        bars = layer_bars(self._graph, config)
        title = f"{study.study_name}, trial {trial.number}: {trial.user_attrs.get('anchor', calibration_text(config))}"
        artifact = attach_picture(trial, self._folder, "precisions.png", draw_precisions(bars, title))
        picture = f"![precision of every layer](/artifacts/{study._study_id}/{trial._trial_id}/{artifact})"
        write_note(trial, note_text(config, measurement, self._baseline) + "\n\n" + picture)


def note_text(config: QuantConfig, measurement: Measurement, baseline: Measurement) -> str:
    """The note of a trial, Markdown: measures against float, then what the configuration is."""
    latency, memory, accuracy = measurement.latency, measurement.memory, measurement.accuracy
    low, high = accuracy.top1_loss_ci_pp
    counts = Counter(config.precision.values())
    rows = [
        "| | trial | float |",
        "|---|---|---|",
        f"| latency, ms | {latency.median_ms:.3f} ± {latency.spread_ms:.3f} | {baseline.latency.median_ms:.3f} |",
        f"| memory | {byte_text(memory.peak_bytes)} | {byte_text(baseline.memory.peak_bytes)} |",
        f"| {accuracy.metric}, % | {accuracy.top1:.2f} | {baseline.accuracy.top1:.2f} |",
        f"| {accuracy.second_metric}, % | {accuracy.top5:.2f} | {baseline.accuracy.top5:.2f} |",
        "",
        f"{accuracy.metric.replace('top', 'Top')} loss **{accuracy.top1_loss_pp:+.2f} pp** "
        f"(95 % interval {low:+.2f} to {high:+.2f}) "
        f"on {accuracy.images} images; **{baseline.latency.median_ms / latency.median_ms:.2f} times** as fast as float.",
        "",
        "- layers: " + ", ".join(f"{count} {precision}" for precision, count in sorted(counts.items())),
        f"- calibration: {calibration_text(config)}",
    ]
    if latency.source == "modelled":
        rows.append(
            "- **latency is modelled**: the sum of its kernels' times on the device and what calls cost there, not measured; "
            "memory is counted; accuracy was measured, on this machine's CPU"
        )
    if latency.ratio is not None:
        noisy = "; **too noisy to rely on**" if latency.noisy else ""
        clock = "of the thread's processor time" if latency.threads == 1 else "on the wall"
        rows.append(f"- timing: {latency.ratio:.3f} of float in turns with it, {latency.raw_ms:.3f} ms {clock}{noisy}")
    if measurement.kernels_sha256:
        rows.append(f"- kernels: {measurement.kernels_sha256[:12]}")
    return "\n".join(rows)


# What a value that says too little alone is of; what is on or off.
_OF = {
    "weight_symmetry": "weights",
    "activations": "activations",
    "rounding": "rounding",
    "bias_correction": "bias correction",
}
_SWITCHES = {"equalization": "equalized", "bias_absorption": "biases absorbed"}


def calibration_text(config: QuantConfig) -> str:
    """Calibration, weight scales and methods of a configuration in a few words."""
    used = set(config.precision.values())
    if used and used <= set(UNSCALED):
        return f"none, all {' or '.join(sorted(used, reverse=True))}"
    calibration = config.calibration
    mode: str = calibration.mode
    if mode == "percentile":
        mode += f" {calibration.percentile:.7g}"
    elif mode == "global_scale":
        mode += f" {calibration.global_scale:g}"
    words = [mode, config.granularity]
    plain = QuantConfig()
    if config.weight_scale != "max":
        words.append("mse scales" if config.weight_scale == "mse" else config.weight_scale)
    for name, of in _OF.items():
        value = getattr(config, name)
        if value != getattr(plain, name):
            words.append(f"{value.replace('_', ' ')} {of}")
    words += [text for name, text in _SWITCHES.items() if getattr(config, name)]
    if config.migration:
        words.append(f"migration {config.migration:g}")
    if config.rules:
        words.append(f"{len(config.rules)} rule{'s' if len(config.rules) > 1 else ''}")
    return ", ".join(words)


def write_note(trial: optuna.Trial, text: str) -> None:
    """Keep a note where Optuna's dashboard looks for it.

    Done without the dashboard's own function: the dashboard is an extra, a search is not, and that function reads
    every note of the study to write one.
    """
    _keep(trial.study, f"dashboard:{trial._trial_id}:", text, 1)


def write_study_note(study: optuna.Study, text: str) -> None:
    """Keep a note of the study itself, in place of an earlier one; what its user wrote there is left alone."""
    attributes = study._storage.get_study_system_attrs(study._study_id)
    digest = hashlib.sha256(_body(attributes).encode()).hexdigest()
    if _body(attributes) and attributes.get(_OWN_NOTE) != digest:
        return
    _keep(study, "dashboard:", text, attributes.get("dashboard:note_ver", 0) + 1)
    study._storage.set_study_system_attr(study._study_id, _OWN_NOTE, hashlib.sha256(text.encode()).hexdigest())


def _body(attributes: Mapping[str, Any]) -> str:
    """The study's note as it stands."""
    pieces = (attributes.get(f"dashboard:note_str:{index}", "") for index in range(len(attributes)))
    return "".join(pieces)


def _keep(study: optuna.Study, prefix: str, text: str, version: int) -> None:
    """Write a note in pieces, and empty those that a longer one left."""
    storage, study_id = study._storage, study._study_id
    pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    for index, piece in enumerate(pieces):
        storage.set_study_system_attr(study_id, f"{prefix}note_str:{index}", piece)
    if version > 1:
        kept = storage.get_study_system_attrs(study_id)
        for index in range(len(pieces), len(kept)):
            if kept.get(f"{prefix}note_str:{index}"):
                storage.set_study_system_attr(study_id, f"{prefix}note_str:{index}", "")
    storage.set_study_system_attr(study_id, f"{prefix}note_ver", version)
