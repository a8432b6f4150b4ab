"""The search loop: ask for a configuration, measure it, tell the study.

Optuna's own `optimize` would count duplicates and failures against the budget and would go on after a defect.
"""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import nullcontext
from functools import partial

from qsearch.errors import TrialError
from qsearch.measure.measurement import Measurement
from qsearch.search.loop.pipeline import Pipeline
from qsearch.search.loop.problem import Crew, Limits, Outcome, SearchProblem, Stop
from qsearch.search.loop.trial_book import Begun, OnTrial, TrialBook
from qsearch.search.study import StudyHandle

__all__ = ["Limits", "Outcome", "SearchProblem", "run_search"]

# How often a crew is asked how many trials it has use for, seconds.
_GROWN_S = 5.0


def run_search(handle: StudyHandle, problem: SearchProblem, limits: Limits, on_trial: OnTrial | None = None) -> Outcome:
    """Run trials until the budget, the time or the space is used up.

    With a pipeline a trial is asked for while the one before is measured: its sampler knows that one's configuration
    and not its result, so that the order of trials is another than one by one.

    Args:
        handle: The study.
        problem: What is searched.
        limits: When to stop.
        on_trial: Called after every trial that was measured or failed.

    Returns:
        Why it ended. An interrupt (Ctrl-C) is an outcome, not an exception: the trials it fell into are failed and
        their configurations enqueued again.

    Raises:
        StudyError: The study cannot be written, or trial after trial failed.
    """
    book, pipeline = TrialBook(handle, problem, limits, on_trial), problem.pipeline
    try:
        book.open()
        try:
            with nullcontext() if pipeline is None else pipeline.aside():
                while True:
                    stopped = _pass(book)
                    if stopped != "budget" or book.met():
                        return book.outcome(stopped)
        except BaseException as error:
            # Full disk, interrupt, defect: what was under way is tried again by the next run.
            book.abandon_all(error)
            raise
        finally:
            book.close()
    except KeyboardInterrupt:
        return book.outcome("interrupted")


def _pass(book: TrialBook) -> Stop:
    """Run trials until there is a reason to ask for no more of them."""
    problem = book.problem
    if problem.crew is not None:
        return _side_by_side(book, problem.crew)
    return _one_by_one(book) if problem.pipeline is None else _overlapped(book, problem.pipeline)


def _one_by_one(book: TrialBook) -> Stop:
    while True:
        begun, reason = book.asked()
        if begun is None:
            assert reason is not None
            return reason
        rule = book.rule()
        evaluate = partial(book.problem.evaluate, begun.config, *([rule] if rule else []))
        book.conclude(begun, book.ended(begun, evaluate))


def _side_by_side(book: TrialBook, crew: Crew) -> Stop:
    """As many trials are under way as the crew has use for."""
    under_way: dict[Future[Measurement], Begun] = {}
    while True:
        reason = None
        while reason is None and len(under_way) < crew.width():
            begun, reason = book.asked()
            if begun is not None:
                under_way[crew.submit(begun.config, book.rule())] = begun
        if not under_way:
            assert reason is not None
            return reason
        # Looked at from time to time all the same: the crew may have grown.
        for future in wait(under_way, timeout=_GROWN_S, return_when=FIRST_COMPLETED).done:
            begun = under_way.pop(future)
            book.conclude(begun, book.ended(begun, future.result))


def _overlapped(book: TrialBook, pipeline: Pipeline) -> Stop:
    """One trial is measured while the one before is written down and the next one asked for and built."""
    under_way: Begun | None = None
    while True:
        ahead, reason = book.asked()
        if ahead is not None and ahead.retried and under_way is not None:
            # It may take the process down, and what is measured meanwhile would seem to be the cause as well.
            book.conclude(under_way, book.ended(under_way, partial(pipeline.result, under_way.measured)))
            under_way = None
        if ahead is not None and not _built(book, ahead, pipeline):
            continue
        done, under_way = under_way, ahead
        ended = None if done is None else book.ended(done, partial(pipeline.result, done.measured))
        if under_way is not None:
            under_way.measured = pipeline.measure(under_way.packed, book.rule())
        if done is not None and ended is not None:
            book.conclude(done, ended)
        elif reason is not None:
            return reason
        if under_way is not None and under_way.retried:
            book.conclude(under_way, book.ended(under_way, partial(pipeline.result, under_way.measured)))
            under_way = None


def _built(book: TrialBook, begun: Begun, pipeline: Pipeline) -> bool:
    """Link a trial; one that cannot be linked has failed."""
    try:
        begun.packed = pipeline.pack(begun.config)
    except TrialError as error:
        book.conclude(begun, error)
        return False
    return True
