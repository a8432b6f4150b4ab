"""Two sides of a comparison against each other: what was measured of each, and the layers in which they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from qsearch.config import LayerSettings, LayerType, QuantConfig
from qsearch.errors import SpaceError, UsageError
from qsearch.qtype import UNSCALED
from qsearch.session.compared import Compared

__all__ = ["comparison_document"]

_Metrics = Mapping[str, Any]
# Of the whole configuration: what `layers` tells layer by layer is told there.
_BY_LAYER = ("version", "precision", "default_precision", "skip", "skip_conv_layers", "skip_dense_layers", "rules")


def comparison_document(one: Compared, other: Compared) -> dict[str, Any]:
    """Compare two sides.

    Returns:
        a, b: title, kind, metrics, identity, front, config of each; metrics: a row per measure that both have, see `_rows`;
        methods: key -> [a, b], where the configurations as a whole differ; layers: how many there are and are alike, and
        those that differ in precision, or in methods by more than `methods` says; remarks: what keeps figures from being
        compared.

    Raises:
        UsageError: They are of different models.
    """
    known = _layers(one, other)
    methods = _methods(one.config, other.config)
    differing, count = _differing(one, other, known, methods)
    return {
        "a": _side(one),
        "b": _side(other),
        "metrics": list(_rows(one, other)),
        "methods": methods,
        "layers": {"count": count, "alike": count - len(differing), "differ": differing},
        "remarks": list(_remarks(one, other)),
    }


def _side(side: Compared) -> dict[str, Any]:
    config, front = side.config.to_json(), None if side.front is None else dict(side.front)
    metrics = None if side.metrics is None else dict(side.metrics)
    return {
        "title": side.title,
        "kind": side.kind,
        "identity": dict(side.identity),
        "metrics": metrics,
        "front": front,
        "config": config,
    }


def _layers(one: Compared, other: Compared) -> dict[str, LayerType]:
    """Name -> type of the layers of the model that both are of; empty where neither says.

    Raises:
        UsageError: They are of different models.
    """
    prints = [side.identity.get("model") for side in (one, other)]
    if None not in prints and prints[0] != prints[1]:
        shown = " and ".join(f"{side.title} ({str(side.identity['model'])[:12]})" for side in (one, other))
        raise UsageError(f"these are of different models, by weights or structure: {shown}; compare what is of one model")
    known = [{layer["name"]: layer["type"] for layer in side.layers} for side in (one, other) if side.layers]
    if len(known) == 2 and known[0] != known[1]:
        raise UsageError(f"{one.title} and {other.title} are of different models: their layers are not the same")
    return known[0] if known else {}


def _differing(
    one: Compared, other: Compared, known: Mapping[str, LayerType], methods: Mapping[str, list[Any]]
) -> tuple[list[dict[str, Any]], int]:
    """The layers that differ, in the order of the network where it is known; and the number of all."""
    if known:
        first, second = (_resolved(side, known) for side in (one, other))
    else:
        first, second = _named(one, other)
    found = []
    for name in first:
        a, b = _told(first[name]), _told(second[name])
        apart = {key: [a.get(key), b.get(key)] for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)}
        # Where only one has integers, its methods are no difference from the other's, which has none.
        if "precision" in apart and bool(len(a) > 1) != bool(len(b) > 1):
            apart = {"precision": apart["precision"]}
        apart = {key: pair for key, pair in apart.items() if key == "precision" or methods.get(key) != pair}
        if apart:
            precisions = {"a": first[name].precision, "b": second[name].precision}
            found.append({"layer": name, "type": known.get(name), **precisions, "differences": apart})
    return found, len(first)


def _resolved(side: Compared, known: Mapping[str, LayerType]) -> dict[str, LayerSettings]:
    try:
        return side.config.resolve(known)
    except SpaceError as error:
        raise UsageError(f"{side.title} is not of the other's model: {error}") from error


def _named(one: Compared, other: Compared) -> tuple[dict[str, LayerSettings], dict[str, LayerSettings]]:
    """Settings by the names that the configurations give themselves, where the model's layers are not known.

    Raises:
        UsageError: They name other layers, or choose layers in a way that takes the model to be understood.
    """
    for side in (one, other):
        config = side.config
        if config.rules or config.skip or config.skip_conv_layers or config.skip_dense_layers:
            raise UsageError(
                f"{side.title} has rules or skips, and which layers they are for is not known from these two alone: compare with "
                "a study or a bundle of the model"
            )
    names = [set(side.config.precision) for side in (one, other)]
    # A file may leave the layers out that have its default.
    if not (names[0] <= names[1] or names[1] <= names[0]):
        odd = sorted(names[0] ^ names[1])
        raise UsageError(
            f"{one.title} and {other.title} are of different models: they do not name the same layers ({', '.join(odd[:3])}"
            f"{f' and {len(odd) - 3} more' if len(odd) > 3 else ''})"
        )

    def settings(config: QuantConfig) -> dict[str, LayerSettings]:
        precision = {name: config.precision.get(name, config.default_precision) for name in sorted(names[0] | names[1])}
        return {name: LayerSettings(found, config.calibration, config.weights) for name, found in precision.items()}

    return settings(one.config), settings(other.config)


def _told(settings: LayerSettings) -> dict[str, Any]:
    """A layer's settings by the keys of a configuration; a layer without scales has a precision only."""
    if settings.precision in UNSCALED:
        return {"precision": settings.precision}
    return {
        "precision": settings.precision,
        "calibration": settings.calibration.model_dump(mode="json"),
        **asdict(settings.weights),
    }


def _methods(one: QuantConfig, other: QuantConfig) -> dict[str, list[Any]]:
    first, second = one.model_dump(mode="json"), other.model_dump(mode="json")
    return {key: [first[key], second[key]] for key in first if key not in _BY_LAYER and first[key] != second[key]}


def _rows(one: Compared, other: Compared) -> Iterator[dict[str, Any]]:
    """The measures of both sides.

    Yields:
        name, a, b, and a_interval, b_interval where the measure has them: of latency the median and half the interquartile
        range either way, of losses 95 %; apart: whether the intervals have nothing in common, None where there are none.
    """
    a, b = one.metrics, other.metrics
    if a is None and b is None:
        return
    yield _row("latency_ms", a, b, _spread)
    yield _row("speedup", a, b)
    yield _row("peak_bytes", a, b)
    yield _row("weight_bytes", a, b)
    yield _row("top1_loss_pp", a, b, _interval)
    again = [None if side is None else side["heldout"] for side in (a, b)]
    if any(again):
        yield {**_row("latency_ms", again[0], again[1], _spread), "name": "heldout_latency_ms"}
        yield {**_row("top1_loss_pp", again[0], again[1], _interval), "name": "heldout_top1_loss_pp"}


def _row(name: str, a: _Metrics | None, b: _Metrics | None, interval: Callable[[_Metrics], Any] | None = None) -> dict[str, Any]:
    first, second = (None if side is None or interval is None else interval(side) for side in (a, b))
    apart = None if first is None or second is None else bool(first[1] < second[0] or second[1] < first[0])
    values = {"a": None if a is None else a[name], "b": None if b is None else b[name]}
    return {"name": name, **values, "a_interval": first, "b_interval": second, "apart": apart}


def _spread(side: Mapping[str, Any]) -> list[float] | None:
    spread = side["latency_spread_ms"]
    return None if spread is None else [side["latency_ms"] - spread, side["latency_ms"] + spread]


def _interval(side: Mapping[str, Any]) -> list[float]:
    return list(side["top1_loss_ci_pp"])


def _remarks(one: Compared, other: Compared) -> Iterator[str]:
    if one.identity.get("target") != other.identity.get("target") and one.identity and other.identity:
        targets = " and ".join(str(side.identity.get("target", "unknown")) for side in (one, other))
        yield f"compiled for different targets ({targets}): latencies are of different machines or code"
    data = [side.identity.get("data") for side in (one, other)]
    if None not in data and data[0] != data[1]:
        yield "measured on different images: losses are not of the same"
    for side in (one, other):
        if side.metrics is None:
            yield f"{side.title}: nothing was measured of it; `evaluate` does"
        elif side.metrics["noisy_timing"]:
            yield f"{side.title}: its timing was too noisy to rely on"
        elif side.metrics["latency_source"] == "modelled":
            yield f"{side.title}: its latency is modelled, not measured"
