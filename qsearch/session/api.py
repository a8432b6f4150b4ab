"""`qsearch.search`: the command of that name as a function."""

from __future__ import annotations

import difflib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack, get_args

from rich.console import Console
from torch import nn

from qsearch.data import Preprocessing, read_preprocessing
from qsearch.errors import UsageError
from qsearch.measure.measurement import Task
from qsearch.models.detection import DetectionHead
from qsearch.models.module_file import keep_module
from qsearch.models.zoo import IMAGENET_PREPROCESSING
from qsearch.search.constraints import checked_limits
from qsearch.search.evaluation.evaluator import Settings
from qsearch.search.samplers import PLANNER
from qsearch.search.space import load_space
from qsearch.search.storage import STUDIES
from qsearch.search.study import load_study
from qsearch.session.search_request import SearchRequest, checked_request, default_study
from qsearch.session.study import Study

__all__ = ["SearchOptions", "search"]

# Where modules that have no file of their own are kept.
MODULES = STUDIES / "models"
_OF_MODULES = ("classes", "detection")


class SearchOptions(TypedDict, total=False):
    """What a search may be told besides model, data, target and budget; the names are those of the command's options.

    Attributes:
        study: Name of the study; by default from the model. The same search again continues it.
        storage: SQLAlchemy URL of the study's database.
        space: A YAML file or the name of a preset.
        sampler: planner, random, tpe, nsgaii, nsgaiii or gp.
        seed: Of every random choice.
        timeout: No trial is begun after that many seconds of trials.
        threads: Threads that a module runs on.
        batch: Images of one inference; a module that is given as such takes one.
        jobs: 2 to build a trial while the one before is measured, more for as many workers besides; by default 2 where there
            are processors for it.
        max_latency_ms: Constraint: largest latency wanted.
        max_bytes: Constraint: most memory wanted.
        max_loss_pp: Constraint: most top-1, or a detector's mAP, lost, percentage points.
        early_stopping: Whether trials end as soon as their outcome is certain.
        weights: Checkpoint to load instead of a named model's own weights.
        preprocessing: From image to input: a file, and for a module also a `Preprocessing` or its JSON form.
        classes: Class names of a module, in the order of its logits.
        detection: How a module's output is read as boxes: a `DetectionHead` or its JSON form.
        task: classification or detection; by default what the model says.
        convert_channels: Convert grey images to colour, or the reverse, where the model needs it.
        cost_table: Kernel times of a device that is not here: latency is then modelled.
        rpc: HOST:PORT of a TVM RPC tracker whose device times modules.
        rpc_key: The key of that device.
        progress: Whether to show progress; True unless given.
    """

    study: str
    storage: str
    space: str | Path
    sampler: str
    seed: int
    timeout: float
    threads: int
    batch: int
    jobs: int
    max_latency_ms: float
    max_bytes: float
    max_loss_pp: float
    early_stopping: bool
    weights: str | Path
    preprocessing: str | Path | Preprocessing | Mapping[str, Any]
    classes: Sequence[str]
    detection: DetectionHead | Mapping[str, Any]
    task: Task
    convert_channels: bool
    cost_table: str | Path
    rpc: str
    rpc_key: str
    progress: bool


def search(
    model: str | nn.Module = "demo",
    data: str | Path | None = None,
    *,
    target: str = "llvm",
    budget: int = 200,
    **options: Unpack[SearchOptions],
) -> Study:
    """Search per-layer precisions of a model; the same call again continues its study.

    Args:
        model: A name as on the command line, or a module that takes one image tensor. A module is kept as a file under
            studies/models, named by its content, which is what its study and exports are opened with later.
        data: Directory of labelled images; None for the images that a built-in model brings.
        target: What to compile for, as on the command line.
        budget: Measured trials that the study shall have in total.
        options: See `SearchOptions`.

    Returns:
        The study. Where nothing is within its constraints its front is empty, and `closest` is not.

    Raises:
        QSearchError: The search cannot be carried out.
        KeyboardInterrupt: It was interrupted; its study is intact, and the same call continues it.
    """
    _check_names(options)
    request = checked_request(_request(model, data, target, budget, options))
    shown = options.get("progress", True)
    console = Console(stderr=True, highlight=False) if shown else Console(file=io.StringIO())

    def say(message: str) -> None:
        console.print(message, markup=False, soft_wrap=True)

    from qsearch.session.search_session import run_session

    run_session(request, say, console)
    return Study(load_study(request.study, request.storage), say)


def _check_names(options: Mapping[str, Any]) -> None:
    known = SearchOptions.__annotations__
    if unknown := next((name for name in options if name not in known), None):
        close = difflib.get_close_matches(unknown, [*known, "model", "data", "target", "budget"], 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
        raise UsageError(f"a search has no option {unknown!r}; {hint}")
    task = options.get("task")
    if task is not None and task not in get_args(Task):
        raise UsageError(f"unknown task {task!r}: use {' or '.join(get_args(Task))}, or leave it out")


def _request(model: str | nn.Module, data: str | Path | None, target: str, budget: int, options: SearchOptions) -> SearchRequest:
    name = str(_kept(model, options)) if isinstance(model, nn.Module) else _named(model, options)
    settings = Settings(
        model=name,
        weights=_path(options.get("weights")),
        data=_path(data),
        target=target,
        convert_channels=options.get("convert_channels", False),
        # A module's own is in its file.
        preprocessing=None if isinstance(model, nn.Module) else _path(options.get("preprocessing")),
        seed=options.get("seed", 0),
        threads=options.get("threads", 1),
        batch=options.get("batch", 1),
        task=options.get("task"),
        cost_table=_path(options.get("cost_table")),
        rpc=options.get("rpc"),
        rpc_key=options.get("rpc_key"),
    )
    return SearchRequest(
        settings,
        load_space(str(options.get("space", "default"))),
        options.get("study") or default_study(name),
        options.get("storage"),
        options.get("sampler", PLANNER),
        budget,
        options.get("timeout"),
        checked_limits(options.get("max_latency_ms"), options.get("max_bytes"), options.get("max_loss_pp")),
        options.get("early_stopping", True),
        options.get("jobs"),
    )


def _named(model: Any, options: SearchOptions) -> str:
    """The name of a model that was given by its name."""
    if not isinstance(model, str):
        raise UsageError(f"the model is a name such as 'torchvision:resnet18', or a torch.nn.Module, got {type(model).__name__}")
    given = [name for name in _OF_MODULES if name in options]
    if isinstance(options.get("preprocessing"), Preprocessing | Mapping):
        given.append("preprocessing as a value")
    if given:
        raise UsageError(f"model {model!r} brings its own {given[0]}; that option is for a torch.nn.Module")
    return model


def _kept(module: nn.Module, options: SearchOptions) -> Path:
    """The file of a module."""
    if options.get("batch", 1) != 1:
        raise UsageError("a module is kept for one image at a time: give 'package.module:factory' for larger batches")
    if "weights" in options:
        raise UsageError("a module brings its own weights: load them into it, and leave the option weights out")
    given = options.get("preprocessing", IMAGENET_PREPROCESSING)
    if isinstance(given, str | Path):
        given = read_preprocessing(Path(given))
    elif not isinstance(given, Preprocessing):
        given = Preprocessing.from_json(given)
    classes, detection = options.get("classes"), options.get("detection")
    if detection is not None and not isinstance(detection, DetectionHead):
        detection = DetectionHead.from_json(detection)
    return keep_module(module, given, MODULES, None if classes is None else tuple(map(str, classes)), detection)


def _path(given: Any) -> Path | None:
    return None if given is None else Path(given)
