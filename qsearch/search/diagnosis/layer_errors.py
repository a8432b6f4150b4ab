"""What every layer's integer arithmetic does to its output, and to the outputs of the network.

Per image the float network is run once, keeping all values. Each integer layer is then carried out by the reference on the
float network's own input, rounded as the layer reads it; what it gives, before it is rounded for its readers, differs from
the float layer's output by the layer's own error. Rounding a value counts as the error of those that read it, as in
`qsearch.search.tables.sensitivity`, so that nothing counts twice. The cost of a layer is how far the outputs of the float
network move when that layer's output alone is replaced: the signal-to-noise ratio says how large an error is, and only this
says what it matters. The accumulated error compares the program's own value, which all layers before have moved, with float's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from qsearch.build.foreign import run_foreign
from qsearch.measure.accuracy import mean_divergence
from qsearch.models.graph import Graph, Model, Node
from qsearch.models.interpret import forward, interpret, one_thread
from qsearch.quantize.affine import dequantize, quantize
from qsearch.quantize.program import Op
from qsearch.quantize.reference import run_op, run_program
from qsearch.search.diagnosis.subject import Subject

__all__ = ["LayerError", "layer_errors", "unrounded"]

# (Float outputs, outputs) -> how far apart they are, nats.
Divergence = Callable[[np.ndarray, np.ndarray], float]
# Decibels beyond which a ratio says no more than 'none'.
MOST_DB = 150.0


@dataclass(frozen=True)
class LayerError:
    """The errors of one layer, means over images.

    Attributes:
        layer: Its name.
        position: Its place among the layers, from 0.
        precision: Its precision; of an fp32 layer only the accumulated error is known.
        divergence: Cost: KL(float || network with this layer's error alone), nats.
        snr_db: Power of the float output over that of the layer's own error, decibels.
        channel_snr_db: The same of the median channel; far below `snr_db` where few channels outweigh the rest.
        accumulated_snr_db: The same of the program's value, with the errors of all layers before.
        weight_share: Share of the error's power that rounded weights make, 0 to 1; the rest is that of rounded inputs.
    """

    layer: str
    position: int
    precision: str
    divergence: float | None
    snr_db: float | None
    channel_snr_db: float | None
    accumulated_snr_db: float
    weight_share: float | None

    @property
    def activation_share(self) -> float | None:
        """Share of the error's power that rounded inputs make, 0 to 1."""
        return None if self.weight_share is None else 1.0 - self.weight_share


@dataclass
class _Sums:
    """Sums over images: powers per channel, float64 (C,), and in all."""

    signal: np.ndarray | float = 0.0
    noise: np.ndarray | float = 0.0
    accumulated: np.ndarray | float = 0.0
    of_weights: float = 0.0
    of_inputs: float = 0.0
    divergences: list[float] = field(default_factory=list)


@one_thread()
def layer_errors(
    subject: Subject, images: np.ndarray, go_on: Callable[[int], bool], divergence: Divergence = mean_divergence
) -> tuple[list[LayerError], int]:
    """Find the errors of all layers, one image after the other.

    Args:
        subject: The model under its configuration.
        images: float32 (N, C, H, W), at least one.
        go_on: Called with the number of images done, after each; False ends the search.
        divergence: How far outputs are from float's.

    Returns:
        The layers, those that cost most first and fp32 layers last; and the number of images that were used.
    """
    sums = {name: _Sums() for name in subject.layer_ops}
    graph, done = subject.model.graph, 0
    after = {name: _reached(graph, name) for name in sums}
    for start in range(0, len(images), graph.input.shape[0]):
        image = np.array(images[start : start + graph.input.shape[0]], np.float32, order="C")
        _add_image(subject, image, sums, after, divergence)
        done += len(image)
        if not go_on(done):
            break
    places = {node.name: place for place, node in enumerate(graph.layers)}
    found = [_layer_error(name, places[name], subject.precision[name], one) for name, one in sums.items()]
    return sorted(found, key=lambda one: -1.0 if one.divergence is None else one.divergence, reverse=True), done


def _add_image(
    subject: Subject, image: np.ndarray, sums: dict[str, _Sums], after: dict[str, frozenset[str]], divergence: Divergence
) -> None:
    """Add the errors of all layers on an image."""
    values: dict[str, Tensor] = {}
    given = torch.from_numpy(image)
    outputs = interpret(subject.model, given, lambda node, value: values.update({node.name: value})).numpy()
    held = run_program(subject.program, image, lambda op, inputs: run_foreign(op.key, op.constants, inputs))
    for name, op in subject.layer_ops.items():
        expected, one = _physical(values[name]), sums[name]
        one.signal = one.signal + _power(expected)
        one.accumulated = one.accumulated + _power(_real(subject, name, held[op.output.name]) - expected)
        if op.key.precision == "fp32":
            continue
        changed = _isolated(subject, op, values, one)
        known = {other: value for other, value in values.items() if other not in after[name]}
        with torch.no_grad():
            moved = forward(subject.model, given, known=known | {name: changed})
        one.divergences.append(divergence(outputs, moved.numpy()))


def _reached(graph: Graph, name: str) -> frozenset[str]:
    """The nodes that a value reaches."""
    found = {name}
    for node in graph.nodes:
        if found.intersection(node.inputs):
            found.add(node.name)
    return frozenset(found - {name})


def _isolated(subject: Subject, op: Op, values: dict[str, Tensor], sums: _Sums) -> Tensor:
    """Carry out a layer on the float network's values, add up its errors; returns its output, logical."""
    node = subject.model.graph.by_name[op.name]
    whole, real = [], []
    for name, dtype in zip(node.inputs, op.key.dtypes, strict=False):
        given = _physical(values[name])
        whole.append(given if dtype == "float32" else quantize(given, subject.affines[name, dtype]))
        real.append(_real(subject, name, whole[-1]))
    form = op.output.dtype
    unit = np.float32(1) if form == "float32" else subject.affines[op.name, form].scale
    result = run_op(unrounded(op), whole) * unit
    result = result if node.clip is None else result.clip(*node.clip).astype(np.float32)
    by_inputs = _physical(_in_float(subject.model, node, [_logical(value) for value in real]))
    expected = _physical(values[op.name])
    sums.noise = sums.noise + _power(result - expected)
    sums.of_inputs += float(_power(by_inputs - expected).sum())
    sums.of_weights += float(_power(result - by_inputs).sum())
    return _logical(result)


def unrounded(op: Op) -> Op:
    """An integer layer's operation, its output left as it is before it is rounded: float32, in steps of the output."""
    if op.output.dtype == "float32":
        return op
    key = replace(op.key, dtypes=(*op.key.dtypes[:-1], "float32"), clipped=False)
    return replace(op, key=key, output=replace(op.output, dtype="float32"))


@torch.no_grad()
def _in_float(model: Model, node: Node, inputs: list[Tensor]) -> Tensor:
    """A layer's float output of given inputs."""
    names = dict.fromkeys((model.graph.input.name, *node.inputs))
    nodes = (*(model.graph.by_name[name] for name in names), node)
    cut = replace(model, graph=Graph(nodes, node.name))
    known = dict(zip(node.inputs, inputs, strict=True))
    return forward(cut, torch.zeros(model.graph.input.shape), known=known)


def _real(subject: Subject, name: str, value: np.ndarray) -> np.ndarray:
    """float32 of a value in any of its forms."""
    return value if value.dtype == np.float32 else dequantize(value, subject.affines[name, value.dtype.name])


def _physical(value: Tensor) -> np.ndarray:
    """Channels last."""
    return (value.movedim(1, -1) if value.dim() == 4 else value).numpy()


def _logical(value: np.ndarray) -> Tensor:
    """Channels first, where there are four axes; channels last in memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(value))
    return tensor.movedim(-1, 1) if tensor.dim() == 4 else tensor


def _power(value: np.ndarray) -> np.ndarray:
    """Sum of squares per channel, float64 (C,)."""
    rows = value.reshape(-1, value.shape[-1]).astype(np.float64)
    return np.einsum("nc,nc->c", rows, rows)


def _decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise), within +-MOST_DB; no noise is the most."""
    if noise <= 0.0:
        return MOST_DB
    return float(np.clip(10.0 * np.log10(max(signal, 1e-300) / noise), -MOST_DB, MOST_DB))


def _layer_error(name: str, position: int, precision: str, sums: _Sums) -> LayerError:
    signal, accumulated = np.asarray(sums.signal), np.asarray(sums.accumulated)
    total = _decibels(float(signal.sum()), float(accumulated.sum()))
    if not sums.divergences:
        return LayerError(name, position, precision, None, None, None, total, None)
    noise, parts = np.asarray(sums.noise), sums.of_weights + sums.of_inputs
    live = signal > 0.0
    median = float(np.median(noise[live] / signal[live])) if live.any() else 0.0
    return LayerError(
        layer=name,
        position=position,
        precision=precision,
        divergence=float(np.mean(sums.divergences)),
        snr_db=_decibels(float(signal.sum()), float(noise.sum())),
        channel_snr_db=_decibels(1.0, median),
        accumulated_snr_db=total,
        weight_share=sums.of_weights / parts if parts > 0.0 else 0.0,
    )
