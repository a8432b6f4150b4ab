"""The sensitivity table: what the output moves by when layers are quantized, alone and together; see `sensitivity`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from qsearch.config import QuantConfig

__all__ = ["Pair", "Sensitivity", "integer_pairs"]

# (Layer, precision other than fp32).
Pair = tuple[str, str]


def integer_pairs(layers: Mapping[str, Sequence[str]]) -> tuple[Pair, ...]:
    """Every layer with every precision it may take but fp32, integers or not."""
    return tuple((layer, name) for layer, names in layers.items() for name in names if name != "fp32")


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """The table; a sample is an image with its random direction.

    Attributes:
        layers: Layer name -> the precisions it may take.
        range_keys: Ways of deriving ranges that were measured, see `QuantConfig.ranges_key`.
        weight_keys: Ways of rounding weights, see `QuantConfig.weights_key`.
        activation: float32 (range keys, pairs, samples): s of the rounded activations; pairs of a layer and one of its
            precisions but fp32, in the order of `layers`.
        weight: float32 (weight keys, pairs, samples): s of the rounded weights.
    """

    layers: dict[str, tuple[str, ...]]
    range_keys: tuple[str, ...]
    weight_keys: tuple[str, ...]
    activation: np.ndarray = field(repr=False)
    weight: np.ndarray = field(repr=False)

    @cached_property
    def places(self) -> dict[Pair, int]:
        """Pair -> its place in the arrays."""
        return {pair: place for place, pair in enumerate(integer_pairs(self.layers))}

    def divergence(self, config: QuantConfig) -> dict[str, np.ndarray]:
        """Mean divergence of the outputs when one layer alone is quantized.

        Args:
            config: Of one of the settings measured.

        Returns:
            Layer name -> float64 (its precisions,), nats; 0 for fp32.
        """
        samples = self._samples(config)
        return {
            layer: np.array([0.5 * np.mean(self._of(samples, layer, name) ** 2) for name in names])
            for layer, names in self.layers.items()
        }

    def coupling(self, layers: tuple[str, str], config: QuantConfig) -> np.ndarray:
        """What two layers quantized together add to the sum of their divergences.

        Args:
            layers: Two layers.
            config: Of one of the settings measured.

        Returns:
            float64 (precisions of the first, precisions of the second), nats, of either sign; 0 beside fp32.
        """
        samples = self._samples(config)
        first, second = (np.stack([self._of(samples, layer, name) for name in self.layers[layer]]) for layer in layers)
        return first @ second.T / samples.shape[1]

    def totals(self, pairs: Sequence[Pair], coupled: Sequence[tuple[int, int]]) -> np.ndarray:
        """The divergence of some layers together, for every way of deriving ranges with every way of rounding weights.

        Args:
            pairs: Which layers, in which precisions.
            coupled: Places in `pairs` of two layers whose coupling counts.

        Returns:
            float64 (range keys, weight keys), nats.
        """
        places = np.array([self.places[pair] for pair in pairs], np.int64)
        activation, weight = (one[:, places].astype(np.float64) for one in (self.activation, self.weight))
        own = np.arange(len(places))
        total = 0.5 * _products(activation, weight, own, own)
        if coupled:
            total += _products(activation, weight, *np.array(coupled).T)
        return total / self.activation.shape[2]

    def _samples(self, config: QuantConfig) -> np.ndarray:
        """float64 (pairs, samples)."""
        activation = self.activation[self.range_keys.index(config.ranges_key())]
        return activation.astype(np.float64) + self.weight[self.weight_keys.index(config.weights_key())]

    def _of(self, samples: np.ndarray, layer: str, precision: str) -> np.ndarray:
        return np.zeros(samples.shape[1]) if precision == "fp32" else samples[self.places[layer, precision]]


def _products(activation: np.ndarray, weight: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Sum over samples and over pairs of layers of the product of their s, float64 (range keys, weight keys)."""
    (a, b), (v, w) = ([one[:, places].reshape(len(one), -1) for places in (first, second)] for one in (activation, weight))
    return (a * b).sum(1)[:, None] + (v * w).sum(1)[None, :] + a @ w.T + b @ v.T
