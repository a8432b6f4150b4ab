"""What a diagnosis looks at: a model under one configuration, with the scales of all its values."""

from __future__ import annotations

from dataclasses import dataclass

from qsearch.calibrate.record import StatisticsRecord
from qsearch.config import QuantConfig
from qsearch.models.graph import Model
from qsearch.quantize.affine import Affine
from qsearch.quantize.assign import assign_forms
from qsearch.quantize.lower import value_affines
from qsearch.quantize.program import Op, Program
from qsearch.search.evaluation.model_evaluator import ModelEvaluator

__all__ = ["Subject", "open_subject"]


@dataclass(frozen=True)
class Subject:
    """A model under a configuration.

    Attributes:
        model: What the configuration's methods make of the model; its float outputs are the model's own.
        record: Statistics of its values.
        program: The integer program.
        precision: Layer name -> precision.
        affines: (Node name, form) -> scale and zero point, for values that exist in other forms than float32.
    """

    model: Model
    record: StatisticsRecord
    program: Program
    precision: dict[str, str]
    affines: dict[tuple[str, str], Affine]

    @property
    def layer_ops(self) -> dict[str, Op]:
        """Layer name -> its operation, in the order of the network."""
        return {op.name: op for op in self.program.ops if op.name in self.precision and op.key.kind == "conv2d"}


def open_subject(evaluator: ModelEvaluator, config: QuantConfig) -> Subject:
    """Lower a configuration.

    Raises:
        TrialError: It cannot be quantized.
        SpaceError: It names a layer that the model does not have.
    """
    variant = evaluator.variants(config)
    model = variant.model
    precision = {name: one.precision for name, one in config.resolve(model.graph.layer_types).items()}
    assignment = assign_forms(model.graph, precision)
    affines = value_affines(model, assignment, evaluator.ranges(config), variant.weights, config.activations)
    return Subject(model, variant.record, evaluator.lower(config), precision, affines)
