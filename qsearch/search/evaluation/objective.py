"""The objective: from a configuration to the measurements of its compiled module.

What is paid once per model (loading, import, the float pass, the float module) happens in `open_evaluator`;
what is paid per trial happens in `ModelEvaluator.evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from qsearch.build.target import Target
from qsearch.config import QuantConfig
from qsearch.data import read_preprocessing
from qsearch.models.graph import Graph
from qsearch.models.import_torch import import_model
from qsearch.models.zoo import load_model
from qsearch.search.evaluation.evaluator import Progress, Settings
from qsearch.search.evaluation.model_evaluator import FLOAT, ModelEvaluator
from qsearch.search.evaluation.named_target import named_target
from qsearch.search.evaluation.open_away import open_target_of
from qsearch.search.evaluation.requirements import check_classes, open_dataset, require_asked
from qsearch.search.profile import check_outputs, for_task
from qsearch.search.space import SearchSpace

__all__ = ["FLOAT", "ModelEvaluator", "open_evaluator", "prepare_evaluator", "prepare_for"]

Asked = Mapping[str, QuantConfig | SearchSpace]


def open_evaluator(settings: Settings, progress: Progress, asked: Asked = MappingProxyType({})) -> ModelEvaluator:
    """Load a model and its images, run the float pass, measure the float module.

    Args:
        settings: What to load.
        progress: Called whenever a slow step begins.
        asked: Name -> what will be asked for, if that is known; refused at once where the target cannot have it.

    Raises:
        UsageError: The model, the images or the target cannot be used.
    """
    evaluator = prepare_evaluator(settings, progress, asked)
    # The held-out images are needed last; a bad one among them is better met before the trials than after.
    evaluator.images("heldout")
    progress("measuring the float module")
    evaluator.measure_baseline()
    return evaluator


def prepare_evaluator(settings: Settings, progress: Progress, asked: Asked = MappingProxyType({})) -> ModelEvaluator:
    """Like `open_evaluator`, without measuring the float module."""
    settings = named_target(settings)
    return prepare_for(settings, open_target_of(settings), progress, asked)


def prepare_for(settings: Settings, target: Target, progress: Progress, asked: Asked = MappingProxyType({})) -> ModelEvaluator:
    """Like `prepare_evaluator`, for a target that need not run here."""
    progress(f"loading model {settings.model}")
    loaded = for_task(load_model(settings.model, settings.weights), settings.task)
    preprocessing = read_preprocessing(settings.preprocessing) if settings.preprocessing else loaded.preprocessing
    dataset = open_dataset(settings, loaded, preprocessing)
    progress(f"importing model {settings.model}")
    model = import_model(settings.model, loaded.module, (settings.batch, *preprocessing.shape))
    require_asked(target, asked, model.graph)
    check_classes(model.name, check_outputs(model.graph, loaded), loaded.classes, dataset)
    if model.graph.foreign:
        progress(foreign_notice(model.graph))
    evaluator = ModelEvaluator(settings, model, dataset, target, progress, loaded.detection)
    if loaded.detection is not None or settings.task is not None:
        progress(evaluator.profile.sentence)
    return evaluator


def foreign_notice(graph: Graph) -> str:
    """Name the operators that run in float through TVM's own legalisation."""
    kinds = sorted({node.foreign.target for node in graph.nodes if node.foreign})
    return f"{len(graph.foreign)} operators run in float through TVM's own legalisation: {', '.join(kinds)}"
