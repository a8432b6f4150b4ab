"""Task profiles: what a model is for chooses what is searched by default, and what counts as loss.

A classifier is searched as its space says. Of a detector the layers that give boxes and classes stay precise: with them
the built-in one loses nothing at int8 that its interval would show, without them 0.6 points of mAP, and 8 instead of 4
with 4-bit weights. What a space or a configuration names itself wins.

Nothing is chosen by the statistics of the inputs. A more precise first layer, the obvious candidate for inputs of one
channel or a wide range, changed neither the built-in networks nor EfficientNet-Lite0 at int8 by more than their intervals.
Nor does another calibration than max pay where the statistics are poor: of one calibration image alone the built-in
classifier has 3,245 right by max, 3,245 by mse and 3,242 without images (float: 3,240 of 3,500), EfficientNet-Lite0 332, 332
and 336 (float: 334 of 375); with inputs dimmed to an eighth and single pixels at full brightness 1,303, 1,303 and 1,305
(float: 1,309 of 1,400).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from qsearch.config import PrecisionName, QuantConfig
from qsearch.errors import UnsupportedModelError
from qsearch.measure.measurement import Task
from qsearch.models.detection import DetectionHead
from qsearch.models.graph import Graph
from qsearch.search.space import SearchSpace

if TYPE_CHECKING:
    # Loads torch.
    from qsearch.models.zoo import LoadedModel

__all__ = ["HOW_TO_DECLARE", "Profile", "check_outputs", "for_task", "last_layers", "task_profile"]

# Precisions that a precise layer may take, and the one it takes where nothing is searched.
PRECISE: tuple[PrecisionName, ...] = ("fp32", "int16")
PRECISE_DEFAULT: PrecisionName = "int16"
HOW_TO_DECLARE = (
    "put DETECTION = {'strides': [8, 16]} beside its factory, or the same as JSON into the .pt2 archive's extra file "
    "detection.json; qsearch.models.detection tells what else it may say"
)


@dataclass(frozen=True)
class Profile:
    """The defaults of a task for one model.

    Attributes:
        task: What the model is for.
        precise: Layers that are kept at higher precision.
    """

    task: Task = "classification"
    precise: tuple[str, ...] = ()

    def space(self, space: SearchSpace) -> SearchSpace:
        """A search space in which the precise layers are fp32 or int16, unless the space names them itself."""
        named = [*space.precisions.layers, *space.skip, *(name for rule in space.rules for name in rule.layers)]
        added = dict.fromkeys(_unnamed(self.precise, named), PRECISE)
        if not added:
            return space
        precisions = space.precisions.model_copy(update={"layers": {**space.precisions.layers, **added}})
        return space.model_copy(update={"precisions": precisions})

    def config(self, config: QuantConfig) -> QuantConfig:
        """A configuration in which the precise layers are int16 where its default has fewer bits, unless it names them."""
        if config.default_precision in PRECISE:
            return config
        named = [*config.precision, *config.skip, *(name for rule in config.rules for name in rule.layers)]
        added = dict.fromkeys(_unnamed(self.precise, named), PRECISE_DEFAULT)
        return config.model_copy(update={"precision": {**config.precision, **added}}) if added else config

    @property
    def sentence(self) -> str:
        """What was chosen, for people."""
        if self.task == "classification":
            return "task: classification, the loss is that of top-1"
        kept = f"{', '.join(self.precise)} stay{'' if len(self.precise) > 1 else 's'} at {' or '.join(reversed(PRECISE))}"
        return f"task: detection, the loss is that of mAP; {kept} unless the space or configuration names them"


def for_task(loaded: LoadedModel, task: Task | None) -> LoadedModel:
    """A model read as what it is used for.

    Args:
        loaded: The model.
        task: What the user says it is for; None for what the model says.

    Raises:
        UnsupportedModelError: It shall detect, and does not say how its output is read.
    """
    if task == "classification":
        return replace(loaded, detection=None)
    if task == "detection" and loaded.detection is None:
        raise UnsupportedModelError(f"model {loaded.name!r} does not say how its output is read as boxes: {HOW_TO_DECLARE}")
    return loaded


def check_outputs(graph: Graph, loaded: LoadedModel) -> int:
    """How many classes a model's output has.

    Raises:
        UnsupportedModelError: It is not the output of the task.
    """
    shape = graph.by_name[graph.output].shape
    if loaded.detection is not None:
        return loaded.detection.check_output(loaded.name, shape, graph.input.shape[2:])  # type: ignore[arg-type]
    if len(shape) != 2:
        raise UnsupportedModelError(
            f"model {loaded.name!r} returns shape {shape}; a classifier returns (batch, classes). "
            f"If it is a detector, {HOW_TO_DECLARE}"
        )
    return shape[1]


def task_profile(graph: Graph, head: DetectionHead | None) -> Profile:
    """The profile of a model.

    Args:
        graph: Its layers.
        head: How its output is read; None for a classifier.

    Raises:
        UnsupportedModelError: The head names a layer that the model does not have.
    """
    if head is None:
        return Profile()
    names = [node.name for node in graph.layers]
    for pattern in head.heads:
        if not any(name == pattern or fnmatchcase(name, pattern) for name in names):
            raise UnsupportedModelError(
                f"detection record: heads names {pattern!r}, which matches no layer; the last ones are {', '.join(names[-6:])}"
            )
    last = last_layers(graph)
    precise = (name for name in names if name in last or any(fnmatchcase(name, pattern) for pattern in head.heads))
    return Profile("detection", tuple(precise))


def last_layers(graph: Graph) -> set[str]:
    """Names of the layers whose values reach the output through no other layer."""
    found, waiting, seen = set(), [graph.output], set()
    while waiting:
        node = graph.by_name[waiting.pop()]
        if node.name in seen:
            continue
        seen.add(node.name)
        if node.is_layer:
            found.add(node.name)
        else:
            waiting += node.inputs
    return found


def _unnamed(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    known = list(patterns)
    return [name for name in names if not any(name == pattern or fnmatchcase(name, pattern) for pattern in known)]
