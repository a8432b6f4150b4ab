"""What a command is about: a trial of a study, or a configuration of a model that the options describe."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qsearch.config import QuantConfig
    from qsearch.search.evaluation.evaluator import Settings

__all__ = ["ModelOptions", "Subject", "chosen_subject"]


@dataclass(frozen=True)
class ModelOptions:
    """The options that say which model, images and target; at their defaults where the user gave none."""

    model: str = "demo"
    weights: Path | None = None
    data: Path | None = None
    target: str = "llvm"
    threads: int = 1
    seed: int = 0
    preprocessing: Path | None = None
    convert_channels: bool = False
    batch: int = 1

    def settings(self) -> Settings:
        """They as an evaluator takes them."""
        from qsearch.search.evaluation.evaluator import Settings

        return Settings(**vars(self))

    def given(self) -> list[str]:
        """Names of the options that are not at their defaults."""
        default = ModelOptions()
        return [f"--{name.replace('_', '-')}" for name in vars(default) if getattr(self, name) != getattr(default, name)]


@dataclass(frozen=True)
class Subject:
    """A configuration of a model.

    Attributes:
        settings: Model, images and target.
        config: The configuration.
        title: What to call it.
        study: The study it is of; None for a file.
        trial: Its number there.
        parts: Name of a part (model, data, target) -> fingerprint, as the study keeps them.
    """

    settings: Settings
    config: QuantConfig
    title: str
    study: str | None = None
    trial: int | None = None
    parts: dict[str, str] = field(default_factory=dict)


def chosen_subject(
    study: str | None, trial: int | None, storage: str | None, config: str | None, options: ModelOptions
) -> Subject:
    """What the options of a command name.

    Args:
        study: Name of a study, whose model, images and target these are.
        trial: Number of its trial; None for the front's knee.
        storage: SQLAlchemy URL of the study's database.
        config: A configuration file or a precision, instead of a study.
        options: Model, images and target, beside a configuration.

    Raises:
        UsageError: They contradict each other.
        StudyError: There is no such study or trial, or the trial did not complete.
        SpaceError: The configuration cannot be read.
    """
    from qsearch.config import named_config
    from qsearch.errors import UsageError

    if (study is None) == (config is None):
        raise UsageError("give either --study, with or without --trial, or --config with --model")
    if study is None:
        if trial is not None or storage is not None:
            raise UsageError("--trial and --storage are of a study: give --study too")
        return Subject(options.settings(), named_config(config or ""), f"{config} of {options.model}")
    if given := options.given():
        raise UsageError(
            f"{' and '.join(given)} contradict --study, which says what it searched: leave them out, or give --config"
        )
    return _of_study(study, storage, trial)


def _of_study(name: str, storage: str | None, trial: int | None) -> Subject:
    """A trial of a study, the front's knee by default."""
    from qsearch.report.documents import settings_of
    from qsearch.search.front import pick, study_front, study_point
    from qsearch.search.study import load_study, recorded_parts

    handle = load_study(name, storage)
    with handle.guard():
        if trial is not None:
            _require_complete(handle.study, trial)
            point = study_point(handle.study, trial)
        else:
            point = pick(study_front(handle.study), "knee")
        title, parts = f"trial {point.trial} of study {name}", recorded_parts(handle.study)
        return Subject(settings_of(handle), point.config, title, name, point.trial, parts)


def _require_complete(study: object, number: int) -> None:
    """Say why a trial that did not complete has nothing to be compared with."""
    import optuna

    from qsearch.errors import StudyError

    assert isinstance(study, optuna.Study)
    found = next((one for one in study.get_trials(deepcopy=False) if one.number == number), None)
    if found is None or found.state == optuna.trial.TrialState.COMPLETE:
        return
    way_out = "`front` lists the completed ones; or give a configuration of your own with --config"
    if found.state == optuna.trial.TrialState.FAIL:
        raise StudyError(f"trial {number} failed: {found.user_attrs.get('error', 'no reason was kept')}; {way_out}")
    if "stopped_early" in found.user_attrs:
        reason = found.user_attrs["stopped_early"]
        raise StudyError(f"trial {number} was stopped early ({reason}), so that its loss is not known; {way_out}")
    raise StudyError(f"trial {number} is {found.state.name.lower()}, not complete; {way_out}")
