"""What a planned search draws its trials with: uniform networks, an opening, then plans over ever better tables."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

from qsearch.measure.measurement import Measurement
from qsearch.report.table_notes import attach_tables
from qsearch.search.anchors import enqueue
from qsearch.search.bound_space import BoundSpace
from qsearch.search.constraints import Constraints
from qsearch.search.evaluation.evaluator import Evaluator
from qsearch.search.members import this_member
from qsearch.search.opening import choose_opening, opening_setting, uniform_anchors
from qsearch.search.planner import PlannerSampler, drafted_trials, tried_configs
from qsearch.search.samplers import derived_seed, make_sampler
from qsearch.search.study import StudyHandle
from qsearch.search.study_trials import measured_trials
from qsearch.search.tables.layer_tables import Draft, Tables, layer_rows
from qsearch.session.search_request import SearchRequest

__all__ = ["PlannedTrials", "Step", "begin_opening", "drawn"]

# Whether a study's opening has been chosen, and the value that says that it has not.
_OPENING, _DUE = "opening", "due"


@dataclass(frozen=True)
class Step:
    """Trials of a search that are drawn with the same.

    Attributes:
        prepare: Makes what they are drawn with; it may take minutes.
        budget: How many trials of the study are measured then.
        enqueued_only: Whether they are the enqueued ones alone.
    """

    prepare: Callable[[], None]
    budget: int
    enqueued_only: bool = False


def begin_opening(handle: StudyHandle, bound: BoundSpace) -> None:
    """Enqueue what a planned study begins with before any kernel is timed, unless it has begun."""
    with handle.guard():
        if handle.study.get_trials(deepcopy=False):
            return
        handle.study.set_user_attr(_OPENING, _DUE)
        enqueue(handle.study, uniform_anchors(bound))


@dataclass(frozen=True)
class PlannedTrials:
    """A planned search.

    Attributes:
        handle: The study.
        request: What is wanted.
        bound: Its space, over the model's layers.
        evaluator: Measures.
        baseline: The study's float module.
        trials: How many trials the study had when the search began.
    """

    handle: StudyHandle
    request: SearchRequest
    bound: BoundSpace
    evaluator: Evaluator
    baseline: Measurement
    trials: int

    def steps(self) -> Iterator[Step]:
        """One after the other, each once the one before is done. Tables take minutes: what does without them comes first."""
        yield Step(self._sample, self.request.budget, enqueued_only=True)
        if not self.request.joins and self._measured() < self.request.budget and self._opening_is_due():
            yield Step(self._enqueue_opening, self.request.budget, enqueued_only=True)
        for tables, budget in self.parts():
            yield Step(partial(self._plan, tables), budget)

    def parts(self) -> Iterator[tuple[Callable[[], Tables], int]]:
        """What is planned over after the opening: what makes the tables, and how many trials are measured then."""
        done = self._measured()
        most = max(done, self.request.budget)
        # To time what neighbours cost takes as long as many trials, and finds a front no sooner; unless times are given.
        mixed = self.request.settings.cost_table is not None
        parts: list[tuple[Callable[[], Tables], float]] = [
            (lambda: self._draft.tables(), drafted_trials(self.bound)),
            (partial(self._tables, mixed), math.inf),
        ]
        for tables, trials in parts:
            enough = most <= trials
            if done < trials or enough:
                yield tables, int(min(self.request.budget, trials))
                done = int(min(most, trials))
            if enough:
                return

    @cached_property
    def _draft(self) -> Draft:
        """What trials are planned with before there are tables; its kernels are timed when it is first asked for."""
        return self.evaluator.draft(self.bound, opening_setting(self.bound))

    @property
    def _constraints(self) -> Constraints:
        return Constraints.against(self.baseline, self.request.limits)

    def _tables(self, mixed: bool) -> Tables:
        with self.handle.guard():
            tried = tried_configs(self.handle.study)
        return self.evaluator.tables(self.bound, mixed, tried)

    def _measured(self) -> int:
        with self.handle.guard():
            return len(measured_trials(self.handle.study))

    def _opening_is_due(self) -> bool:
        with self.handle.guard():
            return bool(self.handle.study.user_attrs.get(_OPENING) == _DUE)

    def _sample(self) -> None:
        self.handle.study.sampler = make_sampler("random", self.request.settings.seed, self.trials)

    def _enqueue_opening(self) -> None:
        anchors = choose_opening(self.bound, self._draft.cost, self.baseline, self._constraints)
        with self.handle.guard():
            enqueue(self.handle.study, anchors)
            self.handle.study.set_user_attr(_OPENING, "chosen")

    def _plan(self, tables: Callable[[], Tables]) -> None:
        """Have the study planned over tables from now on."""
        made, seed = tables(), derived_seed(self.request.settings.seed, *drawn(self.request, self.trials))
        self.handle.study.sampler = PlannerSampler(self.bound, made, seed, self._constraints)
        if not self.request.joins:
            attach_tables(self.handle, layer_rows(self.bound, made))


def drawn(request: SearchRequest, trials: int) -> tuple[int, ...]:
    """What a seed is of: processes that begin at the same time must not draw the same."""
    return (trials, zlib.crc32(json.dumps(this_member()).encode())) if request.joins else (trials,)
