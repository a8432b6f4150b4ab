"""Sensitivity: how far the outputs move from float's when one layer is quantized, for every precision and setting.

The measure is the mean divergence KL(float || quantized) over images. With the logits z, their change dz and float's
probabilities p it is, to second order, 1/2 dz' F dz, where F = diag(p) - p p' is the Fisher matrix of the logits. To
first order dz = J d, where d is everything that quantization changes: the rounding of activations where they are read, and
of weights. Per image a random direction v with E[v v'] = F is drawn; then E[(v' J d)**2] = dz' F dz, and one backward pass
of v' z gives for all layers, precisions and settings at once

    s = v' J d = sum over rounded reads of <gradient, rounding error> + <gradient of the weights, their rounding error>.

The divergence is half the mean square of s. The s of several layers add up, so that layers whose errors are not independent
show in the products of their s: the coupling of neighbours and residual partners.

The Fisher matrix of the outputs, pulled back through J, as the metric of small changes, and its equality with the
Gauss-Newton matrix: Martens, New insights and perspectives on the natural gradient method, 2020, sections 5 and 9.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from qsearch.config import BiasCorrection, QuantConfig, WeightSettings
from qsearch.errors import DataError
from qsearch.models.graph import Model
from qsearch.models.interpret import one_thread
from qsearch.quantize.perturbation import Edge, Ranges, Roundings, assigned, rounded_reads, weight_change
from qsearch.quantize.weight_store import WeightStore
from qsearch.search.tables.projection import Projection, Rounded, project
from qsearch.search.tables.sensitivity_table import Pair, Sensitivity, integer_pairs

__all__ = ["IMAGES", "SensitivityRequest", "measure_sensitivity"]

# The order of efficientnet_lite0's layers and precisions agrees to 0.98 (Spearman) with the divergence over all 375 search
# images with 32 of them and to 0.99 with 96; fewer rank layer_wise and 4-bit choices less well.
IMAGES = 96
# Bytes of changed weights that are held at once; where there are more, images are run once for every so many.
MOST_HELD = 2**31


@dataclass(frozen=True)
class SensitivityRequest:
    """What to measure.

    Attributes:
        model: The model.
        images: float32 (N, C, H, W), calibration or search images; N a multiple of the graph's batch.
        ranges: Configuration -> node name -> (low, high) of its value.
        weights: Prepared weights, shared with the trials.
        means: Configuration -> layer name -> mean of its input, where biases are corrected.
        layers: Layer name -> the precisions it may take.
        configs: In whose settings to measure; their precisions do not matter.
        seed: Of the random directions.
    """

    model: Model
    images: np.ndarray
    ranges: Callable[[QuantConfig], Ranges]
    weights: WeightStore
    means: Callable[[QuantConfig], Mapping[str, np.ndarray]]
    layers: Mapping[str, tuple[str, ...]]
    configs: Sequence[QuantConfig]
    seed: int = 0

    @property
    def range_keys(self) -> tuple[str, ...]:
        """Ways of deriving ranges that are asked about."""
        return tuple(self.by_ranges)

    @property
    def weight_keys(self) -> tuple[str, ...]:
        """Ways of rounding weights that are asked about."""
        return tuple(self.by_weights)

    @cached_property
    def by_ranges(self) -> dict[str, QuantConfig]:
        """Key -> one configuration for every way of deriving ranges."""
        return {config.ranges_key(): config for config in self.configs}

    @cached_property
    def by_weights(self) -> dict[str, QuantConfig]:
        """Key -> one configuration for every way of rounding weights."""
        return {config.weights_key(): config for config in self.configs}


@one_thread()
def measure_sensitivity(request: SensitivityRequest, progress: Callable[[int, int], None]) -> Sensitivity:
    """Measure the table: one forward and one backward pass per image, more for the weights of large networks.

    Args:
        request: What to measure.
        progress: Called after every image with the number of passes done and their total.

    Returns:
        The table.

    Raises:
        DataError: There are no images.
        QuantizeError: A layer cannot be represented in one of its precisions.
    """
    if not len(request.images):
        raise DataError("sensitivity needs at least one image; check the data directory")
    reads, sums = _rounded_reads(request)
    groups = _groups(request)
    images, total = len(request.images), len(groups) * len(request.images)
    weight, by_read = [], np.zeros((0, 0), np.float32)
    for n, pairs in enumerate(groups):
        changed = _changed_weights(request, pairs)
        (weights, of_weight), (biases, of_bias) = _by_layer(changed.weights), _by_layer(changed.biases)
        # Reads take no room of their own: all of them in the first pass.
        changes = Rounded(() if n else tuple(reads), weights, biases)
        found = _projected(request, changes, lambda done, n=n: progress(n * images + done, total))  # type: ignore[misc]
        by_read = by_read if n else found.reads
        # One more row, of zeros: the bias that is not corrected.
        by_bias = np.concatenate([found.biases[of_bias], np.zeros((1, found.biases.shape[1]), np.float32)])
        by_weight = found.weights[of_weight]
        moved = np.array([[by_weight[w] + by_bias[b] for w, b in row] for row in changed.used], np.float32)
        weight.append(moved.reshape(len(request.by_weights), len(pairs), by_read.shape[1]))
    activation = np.array([[by_read[places].sum(0) for places in row] for row in sums], np.float32)
    # Shapes in full: a space that leaves no layer a choice has no pairs.
    activation = activation.reshape(len(request.by_ranges), -1 if activation.size else 0, by_read.shape[1])
    return Sensitivity(dict(request.layers), request.range_keys, request.weight_keys, activation, np.concatenate(weight, 1))


def _groups(request: SensitivityRequest) -> list[list[Pair]]:
    """The pairs in order, in groups of layers whose changed weights fit into memory together; at least one group."""
    groups: list[list[Pair]] = [[]]
    held = 0
    for pair in integer_pairs(request.layers):
        size = len(request.by_weights) * request.model.parameters.weight[pair[0]].nbytes
        if groups[-1] and held + size > MOST_HELD:
            groups.append([])
            held = 0
        groups[-1].append(pair)
        held += size
    return groups


def _projected(request: SensitivityRequest, changes: Rounded, progress: Callable[[int], None]) -> Projection:
    """What all images tell, the second axis over them; the same random directions for all changes."""
    generator = torch.Generator().manual_seed(request.seed)
    batch, found = request.model.graph.input.shape[0], []
    for start in range(0, len(request.images), batch):
        image = torch.from_numpy(np.array(request.images[start : start + batch], np.float32, order="C"))
        found.append(project(request.model, image, changes, generator))
        progress(start + len(image))
    return Projection(*(np.stack([getattr(one, name) for one in found], 1) for name in ("reads", "weights", "biases")))


def _rounded_reads(request: SensitivityRequest) -> tuple[dict[tuple[Edge, Roundings], int], list[list[list[int]]]]:
    """Every distinct rounded read, numbered, and the numbers of those of each way of deriving ranges and pair."""
    numbers: dict[tuple[Edge, Roundings], int] = {}
    pairs = integer_pairs(request.layers)
    assignments = [assigned(request.model.graph, dict([pair])) for pair in pairs]
    sums = []
    for config in request.by_ranges.values():
        ranges, row = request.ranges(config), []
        for assignment in assignments:
            reads = rounded_reads(request.model, assignment, ranges, request.weights, config.activations)
            row.append([numbers.setdefault(read, len(numbers)) for read in reads.items()])
        sums.append(row)
    return numbers, sums


@dataclass(frozen=True)
class _Changes:
    """What rounding changes of weights and biases.

    Attributes:
        weights: Layer, precision and settings -> change of its weights; what several ways share is there once.
        biases: The same and how biases are corrected -> change of its bias.
        used: Per way of rounding and pair, the places of its change of weights and of its change of the bias, or -1.
    """

    weights: dict[tuple[Pair, WeightSettings], torch.Tensor] = field(default_factory=dict)
    biases: dict[tuple[Pair, WeightSettings, BiasCorrection], torch.Tensor] = field(default_factory=dict)
    used: list[list[tuple[int, int]]] = field(default_factory=list)


def _changed_weights(request: SensitivityRequest, pairs: Sequence[Pair]) -> _Changes:
    changes = _Changes()
    for config in request.by_weights.values():
        settings, means = config.resolve(request.model.graph.layer_types), request.means(config)
        row = []
        for pair in pairs:
            of, mean = (pair, settings[pair[0]].weights), means.get(pair[0])
            corrected = (*of, config.bias_correction)
            if of not in changes.weights or (mean is not None and corrected not in changes.biases):
                by, shift = weight_change(request.model, pair, of[1], request.weights, mean)
                changes.weights.setdefault(of, torch.from_numpy(by))
                if mean is not None:
                    changes.biases[corrected] = torch.from_numpy(shift)
            bias = list(changes.biases).index(corrected) if mean is not None else -1
            row.append((list(changes.weights).index(of), bias))
        changes.used.append(row)
    return changes


def _by_layer(changes: dict[Any, torch.Tensor]) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Stack the changes of each layer; those that are given are used up, since they take much memory.

    Returns:
        Layer -> its changes, the first axis over them, and the place of each among all of these, int64 (changes,).
    """
    order: dict[str, list[Any]] = {}
    places = {key: n for n, key in enumerate(changes)}
    for key in changes:
        order.setdefault(key[0][0], []).append(key)
    stacked = {layer: torch.stack([changes.pop(key) for key in keys]) for layer, keys in order.items()}
    return stacked, np.argsort([places[key] for keys in order.values() for key in keys]).astype(np.int64)
