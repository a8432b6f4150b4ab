"""What a configuration's methods make of a model before anything is rounded: the same network with other parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from qsearch.calibrate.record import StatisticsRecord
from qsearch.config import BiasCorrection, QuantConfig
from qsearch.models.graph import Model
from qsearch.quantize.bias_absorption import absorb_high_biases
from qsearch.quantize.bias_correction import input_means
from qsearch.quantize.equalization import equalize, likely_maximum
from qsearch.quantize.kept_weights import KeptWeights
from qsearch.quantize.migration import migrate
from qsearch.quantize.rounding.rounded_weights import RoundedWeights
from qsearch.quantize.weight_store import WeightStore

__all__ = ["Variant", "Variants"]


@dataclass(frozen=True)
class Variant:
    """A model ready to be lowered.

    Attributes:
        model: Its graph and parameters.
        record: Statistics of its values.
        weights: Its prepared weights.
    """

    model: Model
    record: StatisticsRecord
    weights: WeightStore
    _means: dict[BiasCorrection, Mapping[str, np.ndarray]] = field(default_factory=dict)

    def means(self, kind: BiasCorrection) -> Mapping[str, np.ndarray]:
        """Mean input of every layer, see `input_means`."""
        if kind not in self._means:
            self._means[kind] = input_means(self.model, kind, self.record)
        return self._means[kind]


class Variants:
    """The variants of one model, each made once.

    Args:
        model: The imported model.
        observe: Gives the statistics of a variant.
        rounded: Gives roundings of a variant's weights that images decide; None where there are no images.
        kept: Where prepared weights are kept; None for a place of their own.
    """

    def __init__(
        self,
        model: Model,
        observe: Callable[[Model], StatisticsRecord],
        rounded: Callable[[Model], RoundedWeights] | None = None,
        kept: KeptWeights | None = None,
    ) -> None:
        self.observe, self.rounded, self.kept = observe, rounded, kept or KeptWeights()
        self.plain = self._variant(model)
        self._made: dict[tuple[bool, bool, float, bool], Variant] = {}

    def __call__(self, config: QuantConfig) -> Variant:
        """The variant that a configuration asks for."""
        # Who asks for a calibration without images shall get nothing that images decided.
        data_free = config.calibration.mode == "global_scale"
        key = (config.equalization, config.bias_absorption, config.migration, data_free)
        if key not in self._made:
            model = self._changed(config, likely_maximum(self.plain.model) if data_free else self._seen)
            # Where a method finds nothing to do, the model is the one that is known.
            same = model.fingerprint == self.plain.model.fingerprint
            self._made[key] = self.plain if same else self._variant(model)
        return self._made[key]

    @cached_property
    def idle(self) -> frozenset[str]:
        """Methods that find nothing to do in this model: with them or without, its modules are the same."""
        plain = self.plain.model
        equalized = [equalize(plain, seen) for seen in (self._seen, likely_maximum(plain))]
        changes = {
            "equalization": equalized,
            "bias_absorption": [absorb_high_biases(one) for one in (plain, *equalized)],
            "migration": [migrate(plain, self._seen, 0.5)],
        }
        before = {"bias_absorption": [plain, *equalized]}
        return frozenset(
            name
            for name, after in changes.items()
            if all(a.fingerprint == b.fingerprint for a, b in zip(before.get(name, [plain] * len(after)), after, strict=True))
        )

    def _variant(self, model: Model) -> Variant:
        return Variant(model, self.observe(model), WeightStore(self.rounded(model) if self.rounded else None, self.kept))

    @cached_property
    def _seen(self) -> dict[str, np.ndarray]:
        """Node name -> largest magnitude per channel, float32 (C,)."""
        tensors = self.plain.record.tensors
        return {name: np.maximum(np.abs(one.channel_minimum), np.abs(one.channel_maximum)) for name, one in tensors.items()}

    def _changed(self, config: QuantConfig, seen: Mapping[str, np.ndarray]) -> Model:
        model = self.plain.model
        if config.migration and config.calibration.mode != "global_scale":
            model = migrate(model, seen, config.migration)
        if config.equalization:
            model = equalize(model, seen)
        if config.bias_absorption:
            model = absorb_high_biases(model)
        return model
