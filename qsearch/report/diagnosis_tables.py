"""A diagnosis for the terminal: tables, and sentences for what no table needs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence

from rich.table import Table

from qsearch.config import QuantConfig
from qsearch.report.pictures import byte_text
from qsearch.report.tables import plain_table
from qsearch.search.diagnosis.diagnosis import Diagnosis
from qsearch.search.diagnosis.remedies import Remedy, nats
from qsearch.search.diagnosis.values import DEAD

__all__ = ["advice", "diagnosis_text"]

SHOWN_LAYERS = 10
SHOWN = 5


def diagnosis_text(diagnosis: Diagnosis, title: str, seconds: float) -> list[str | Table]:
    """The whole diagnosis, to be printed part by part.

    Args:
        diagnosis: What was found.
        title: Name of the configuration.
        seconds: What the remedies were given.
    """
    parts: list[str | Table] = [f"{title}: {_loss_words(diagnosis)}", _chosen_words(diagnosis), _layer_table(diagnosis)]
    parts += _findings(diagnosis)
    parts += [_remedy_table(diagnosis)] if diagnosis.remedies.measured else []
    return [*parts, *_remedy_words(diagnosis, seconds), advice(diagnosis)]


def _loss_words(diagnosis: Diagnosis) -> str:
    """The loss of the configuration in a sentence."""
    accuracy = diagnosis.accuracy
    low, high = accuracy.top1_loss_ci_pp
    return (
        f"{accuracy.metric} {accuracy.top1:.2f} %, loss {accuracy.top1_loss_pp:+.2f} pp "
        f"(95 % interval {low:+.2f} to {high:+.2f}) on {accuracy.images} search images; "
        f"outputs {nats(accuracy):.4f} nats from float's; "
        f"{byte_text(diagnosis.memory.peak_bytes)}"
    )


def _chosen_words(diagnosis: Diagnosis) -> str:
    """What the configuration chooses: its precisions, how it calibrates and scales, and whatever is not as usual."""
    config = diagnosis.config
    counts = Counter(one.precision for one in diagnosis.layers)
    layers = " ".join(f"{counts[name]}·{name}" for name in sorted(counts))
    words = [layers, f"calibration {_calibration(config)}", config.granularity, f"weight scale {config.weight_scale}"]
    told = ("version", "default_precision", "precision", "calibration", "granularity", "weight_scale")
    usual, given = QuantConfig().to_json(), config.to_json()
    words += [f"{name} {json.dumps(value)}" for name, value in given.items() if name not in told and value != usual.get(name)]
    return "chosen: " + ", ".join(words)


def _calibration(config: QuantConfig) -> str:
    numbers = {"percentile": config.calibration.percentile, "global_scale": config.calibration.global_scale}
    mode = config.calibration.mode
    return f"{mode} {numbers[mode]:g}" if mode in numbers else mode


def _layer_table(diagnosis: Diagnosis) -> Table:
    """The layers that cost most."""
    layers, images = diagnosis.layers, diagnosis.layer_images
    title = f"the layers that cost most, {min(SHOWN_LAYERS, len(layers))} of {len(layers)}, on {images} images"
    numbers = ("cost, nats", "SNR dB", "of channels", "accumulated", "weights", "activations", "clipped")
    table = plain_table(title, ("layer", "precision"), numbers)
    clipped = {one.value: one.share for one in diagnosis.clipped}
    for one in layers[:SHOWN_LAYERS]:
        share = f"{clipped[one.layer]:.2%}" if one.layer in clipped else ""
        if one.divergence is None:
            table.add_row(one.layer, one.precision, "", "", "", f"{one.accumulated_snr_db:.1f}", "", "", share)
            continue
        table.add_row(
            one.layer,
            one.precision,
            f"{one.divergence:.2e}",
            f"{one.snr_db:.1f}",
            f"{one.channel_snr_db:.1f}",
            f"{one.accumulated_snr_db:.1f}",
            f"{one.weight_share:.0%}",
            f"{one.activation_share:.0%}",
            share,
        )
    return table


def _findings(diagnosis: Diagnosis) -> Iterator[str]:
    """What is clipped, dead or not covered, in sentences."""
    if not diagnosis.clipped:
        yield "clipped: nothing that the calibration images show"
    for one in diagnosis.clipped[:SHOWN]:
        yield (
            f"clipped: {one.share:.2%} of the values of {one.value!r} lie beyond [{one.low:.4g}, {one.high:.4g}]; they were seen "
            f"from {one.minimum:.4g} to {one.maximum:.4g}"
        )
    if more := diagnosis.clipped[SHOWN:]:
        yield f"clipped: {len(more)} more values, {more[0].share:.2%} of each or less"
    for kind, words in DEAD.items():
        of_kind = [one for one in diagnosis.dead if one.kind == kind]
        if of_kind:
            named = _some([f"{one.layer!r} {len(one.channels)} of {one.of}" for one in of_kind])
            yield f"dead channels, {words}: {named}"
    coverage = diagnosis.coverage
    for warning in coverage.warnings:
        yield f"calibration: {warning}"
    if coverage.growth:
        most = _some([f"{name!r} {share:+.0%}" for name, share in coverage.growth.items()])
        yield f"calibration: the second half of the {coverage.images} images widened most the ranges of {most}"


def _some(words: Sequence[str]) -> str:
    return ", ".join(words[:SHOWN]) + (f" and {len(words) - SHOWN} more" if len(words) > SHOWN else "")


def _remedy_table(diagnosis: Diagnosis) -> Table:
    """The measured remedies, those that gain most first."""
    before = diagnosis.accuracy
    title = f"remedies, measured on {before.images} search images, paired"
    numbers = ("loss before pp", "after pp", "gained pp", "95 % interval", "nats", "latency", "memory")
    table = plain_table(title, ("remedy",), numbers)
    for one in diagnosis.remedies.measured:
        low, high = one.gain_ci_pp
        table.add_row(
            one.candidate.name,
            f"{before.top1_loss_pp:+.2f}",
            f"{one.accuracy.top1_loss_pp:+.2f}",
            f"{one.gain_pp:+.2f}",
            f"{low:+.2f} to {high:+.2f}",
            f"{nats(one.accuracy):.4f}",
            f"{one.latency_ratio:.2f}x",
            byte_text(one.memory.peak_bytes),
            style="bold" if one is diagnosis.first else None if one.helps else "dim",
        )
    return table


def _remedy_words(diagnosis: Diagnosis, seconds: float) -> Iterator[str]:
    """What became of the remedies that no table lists."""
    remedies = diagnosis.remedies
    if remedies.unchanged:
        yield f"changes nothing here: {', '.join(remedies.unchanged)}"
    if remedies.skipped:
        yield f"not tried, as they would not fit into {seconds:g} seconds (--seconds): {', '.join(remedies.skipped)}"
    for name, reason in remedies.failed.items():
        yield f"cannot be built: {name}: {reason}"


def advice(diagnosis: Diagnosis) -> str:
    """What to try first, in a sentence that ends with a fragment of a configuration."""
    first, accuracy = diagnosis.first, diagnosis.accuracy
    if first is not None:
        return f"try first: {first.candidate.name}, {_gained(first)}: set {json.dumps(first.candidate.change)}"
    lost = accuracy.top1_loss_ci_pp[0] > 0
    start = (
        "no single remedy gains more than chance explains"
        if lost
        else f"what is lost is not more than chance explains on {accuracy.images} images, and no remedy gains more"
    )
    nearest = min(diagnosis.remedies.measured, key=lambda one: nats(one.accuracy), default=None)
    if nearest is None or nats(nearest.accuracy) >= nats(accuracy):
        return f"{start}; nor brings any the outputs nearer to float's: search over precisions, or give more images"
    return (
        f"{start}; nearest to float ({nats(accuracy):.4f} -> {nats(nearest.accuracy):.4f} nats) "
        f"comes {nearest.candidate.name}: set {json.dumps(nearest.candidate.change)}"
    )


def _gained(one: Remedy) -> str:
    low, high = one.gain_ci_pp
    return f"which gains {one.gain_pp:+.2f} pp ({low:+.2f} to {high:+.2f}) at {one.latency_ratio:.2f} times the latency"
