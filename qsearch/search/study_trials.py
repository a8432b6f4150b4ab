"""The trials of a study: which of them count, which configurations are known, and what becomes of those that were abandoned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from qsearch.search.members import gone

__all__ = ["finished", "is_measured", "known_configurations", "measured_trials", "reap_trials", "requeue"]

# Once more than the first time.
MOST_ATTEMPTS = 2
# Attribute of a trial whose configuration is not tried again.
GIVEN_UP = "given_up"
_JUDGED = (TrialState.COMPLETE, TrialState.PRUNED)


def finished(study: optuna.Study, state: TrialState = TrialState.COMPLETE) -> list[FrozenTrial]:
    """The study's trials in one state, by number; shared with the storage, not to be changed."""
    return study.get_trials(deepcopy=False, states=(state,))


def measured_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that count against a budget, by number: the completed ones, and those stopped early.

    A stopped trial was built, timed and run on some images, and need not be tried again. A duplicate was not measured.
    """
    return [trial for trial in study.get_trials(deepcopy=False, states=_JUDGED) if is_measured(trial)]


def is_measured(trial: FrozenTrial) -> bool:
    """Whether a trial counts against a budget, see `measured_trials`."""
    return trial.state == TrialState.COMPLETE or (trial.state == TrialState.PRUNED and "bound" in trial.user_attrs)


def known_configurations(trials: Iterable[FrozenTrial]) -> dict[str, int]:
    """Content hash -> number of the trial, for what was measured, is under way or was given up."""
    known = [
        trial for trial in trials if is_measured(trial) or trial.state == TrialState.RUNNING or trial.user_attrs.get(GIVEN_UP)
    ]
    return {trial.user_attrs["config_hash"]: trial.number for trial in known if "config_hash" in trial.user_attrs}


def requeue(study: optuna.Study, trial: FrozenTrial, blamed: bool = False) -> bool:
    """Enqueue the parameters of a trial that did not end by its own doing.

    A configuration that takes the process down each time would keep a study from ever going on, so it is tried once more and
    then given up.

    Args:
        study: Driven by nobody else.
        trial: The trial.
        blamed: Whether it may be what ended the process; an interrupt or a full disk is nobody's attempt.

    Returns:
        Whether it was enqueued.
    """
    attempt = int(trial.user_attrs.get("attempt", 1)) + blamed
    # A trial killed while it was being proposed has only its first parameters; a planned one knows the others.
    values: dict[str, Any] = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    if attempt > MOST_ATTEMPTS or not values:
        return False
    kept = {key: trial.user_attrs[key] for key in ("anchor",) if key in trial.user_attrs}
    study.enqueue_trial(values, user_attrs={**kept, "retry_of": trial.number, "attempt": attempt})
    return True


def reap_trials(study: optuna.Study, reason: str = "the process was killed") -> int:
    """Fail the trials that killed processes left running, and enqueue their configurations again; to be called in a turn.

    Args:
        study: The study.
        reason: What happened to the process.

    Returns:
        Number of such trials.
    """
    running = finished(study, TrialState.RUNNING)
    heard = getattr(study._storage, "_get_stale_trial_ids", None)
    silent = set(heard(study._study_id)) if heard is not None and running else set()
    left = [trial for trial in running if gone(trial, silent)]
    for trial in left:
        # Enqueued before it is failed: a second kill in between gives a duplicate, which is recognised, not a loss.
        again = requeue(study, trial, blamed=True)
        storage, trial_id = study._storage, trial._trial_id
        given_up = "" if again else f"; given up after {trial.user_attrs.get('attempt', 1)} attempts"
        if given_up:
            storage.set_trial_user_attr(trial_id, GIVEN_UP, True)
        storage.set_trial_user_attr(trial_id, "error", reason + given_up)
        study.tell(trial.number, state=TrialState.FAIL)
    return len(left)
