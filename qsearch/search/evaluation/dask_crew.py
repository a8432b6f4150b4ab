"""Trials on a Dask cluster: modules are built where workers offer `compile`, and measured where they offer `device`.

The search asks and tells; what it asks for goes to the cluster in two tasks, and a module travels between them with the kernels
that it is linked from. A worker opens the model once and keeps it. Tasks whose worker dies are run again by Dask on another.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsearch.build.travelling import TravellingModule
from qsearch.config import QuantConfig
from qsearch.errors import MeasureError, QSearchError, StudyError, TrialError, UsageError
from qsearch.measure.devices.device import Prepared
from qsearch.measure.measurement import Measurement
from qsearch.search.evaluation.cache_entries import TRAVELLED
from qsearch.search.evaluation.evaluator import CACHE, Evaluator, Progress, Settings
from qsearch.search.loop.early_stopping import Bound, EarlyStop, StoppingRule

if TYPE_CHECKING:
    from qsearch.search.evaluation.model_evaluator import ModelEvaluator

__all__ = ["COMPILE", "DEVICE", "DaskCrew", "dask_crew", "require_cluster"]

# What workers offer, one of each for every task that they may be given at a time.
COMPILE, DEVICE = "compile", "device"
_CONNECT_S = 10
_HINT = (
    "start workers with what they offer: `dask worker ADDRESS --nthreads 1 --resources compile=1` for each that builds, and "
    "`dask worker ADDRESS --nthreads 1 --resources device=1`, one on each machine, to measure"
)
_GONE = "the Dask cluster is gone; start it and run the same command again, every finished trial is kept"


@contextmanager
def _cluster() -> Iterator[None]:
    """Say of a scheduler that does not answer any more what to do."""
    try:
        yield
    except (OSError, TimeoutError) as error:
        raise StudyError(_GONE) from error


@dataclass(frozen=True)
class Errand:
    """What a worker needs to know of a search.

    Attributes:
        settings: Model, images and target, in plain types.
        identity: Fingerprints of what they must turn out to be.
        baseline: The float module that everything is counted against, in plain types.
        lane: File that one measurement at a time holds on a machine.
    """

    settings: Mapping[str, Any]
    identity: Mapping[str, str]
    baseline: Mapping[str, Any]
    lane: str

    @property
    def key(self) -> str:
        """Tells errands apart."""
        return hashlib.sha256(json.dumps(vars(self), sort_keys=True, default=dict).encode()).hexdigest()


class _Opened:
    """The models that this process has open; building and opening are one thread's at a time."""

    def __init__(self) -> None:
        self.evaluators: dict[str, ModelEvaluator] = {}
        self.lock = threading.RLock()

    def evaluator(self, errand: Errand) -> ModelEvaluator:
        """Of a search.

        Raises:
            QSearchError: The model cannot be opened, or is another one here.
        """
        from qsearch.search.evaluation.objective import prepare_evaluator
        from qsearch.search.front import measurement_from_json

        with self.lock:
            if errand.key not in self.evaluators:
                settings = Settings.from_json(dict(errand.settings))
                if not settings.cache_dir.parent.is_dir():
                    # Of the machine that searches.
                    settings = replace(settings, cache_dir=CACHE)
                found = prepare_evaluator(settings, lambda clause: None)
                here = {**found.identity, "device_kind": found.device_kind}
                other = [part for part, value in errand.identity.items() if here.get(part) != value]
                if other:
                    told = "; ".join(f"{part} is {here.get(part)!r} here and {errand.identity[part]!r} there" for part in other)
                    raise UsageError(f"this worker would measure something else than the search: {told}")
                found.refer_to(measurement_from_json(dict(errand.baseline)))
                found.keep_to(Path(errand.lane))
                self.evaluators[errand.key] = found
            return self.evaluators[errand.key]


_opened = _Opened()


def check_worker(errand: Errand) -> str | None:
    """What keeps this worker from serving a search; None if nothing does."""
    try:
        _opened.evaluator(errand)
    except QSearchError as error:
        return str(error)
    return None


def build(errand: Errand, config: Mapping[str, Any]) -> tuple[TravellingModule, Prepared] | TrialError:
    """Lower, compile and link a configuration; what is wrong with it is an answer, not a failure of the task."""
    with _opened.lock:
        evaluator = _opened.evaluator(errand)
        folder = evaluator.settings.cache_dir / "modules"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            prepared = evaluator.pack(QuantConfig.model_validate(dict(config)), folder)
        except TrialError as error:
            return error
    # What opens it is the packed module's own method, whose file is of this machine.
    packed = prepared.open.__self__  # type: ignore[attr-defined]
    return TravellingModule.of(packed), replace(prepared, open=None)  # type: ignore[arg-type]


def measure(
    errand: Errand, built: tuple[TravellingModule, Prepared] | TrialError, rule: StoppingRule | None
) -> Measurement | Bound | TrialError:
    """Measure what `build` has built."""
    if isinstance(built, TrialError):
        return built
    evaluator = _opened.evaluator(errand)
    module, prepared = built
    packed = module.unpack(evaluator.settings.cache_dir / TRAVELLED)
    try:
        with _opened.lock:
            return evaluator.measurer.measure(replace(prepared, open=packed.open), rule)
    except EarlyStop as stop:
        return stop.bound
    except TrialError as error:
        return error
    finally:
        packed.file.unlink(missing_ok=True)


class DaskCrew:
    """The workers of a Dask cluster; use as a context manager around a search.

    Args:
        address: Of the scheduler, such as tcp://host:8786.
        errand: What they are to know.
        say: Told of what is waited for.
    """

    def __init__(self, address: str, errand: Errand, say: Progress) -> None:
        self._address, self._errand, self._say = address, errand, say

    def __enter__(self) -> DaskCrew:
        """Connect, and see that every worker opens the same model.

        Raises:
            UsageError: As of `connect`; or a worker would measure something else.
        """
        self._client, offered = connect(self._address)
        try:
            self._say(f"{offered[COMPILE]} builders and {offered[DEVICE]} devices at {self._address} open the model")
            with _cluster():
                problems = self._client.run(check_worker, self._errand, on_error="return")
            for worker, problem in problems.items():
                if isinstance(problem, Exception):
                    # One that went away meanwhile will measure nothing.
                    if not isinstance(problem, OSError):
                        raise problem
                elif problem is not None:
                    raise UsageError(f"Dask worker {worker}: {problem}")
        except BaseException:
            self._client.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Cancel what is under way, and leave."""
        with suppress(OSError, TimeoutError):
            # The scheduler may have gone before.
            self._client.close()

    def width(self) -> int:
        """Trials worth having under way: one for every builder and every device there is now."""
        with _cluster():
            return max(1, sum(_offered(self._client).values()))

    def submit(self, config: QuantConfig, rule: StoppingRule | None) -> Future[Measurement]:
        """Build and measure a configuration somewhere.

        Returns:
            The measurement to be; or EarlyStop, or a TrialError.

        Raises:
            StudyError: The scheduler is gone.
        """
        result: Future[Measurement] = Future()
        try:
            built = self._client.submit(build, self._errand, config.to_json(), resources={COMPILE: 1}, pure=False)
            found = self._client.submit(measure, self._errand, built, rule, resources={DEVICE: 1}, pure=False)
        except Exception as error:
            # A client that has given its scheduler up is closed, and what it then raises has no base of its own.
            if self._client.status == "running":
                raise
            raise StudyError(_GONE) from error
        found.add_done_callback(lambda done: _answer(done, result))
        return result


def connect(address: str) -> tuple[Any, dict[str, int]]:
    """Connect to a cluster.

    Args:
        address: Of its scheduler.

    Returns:
        A `distributed.Client`, and what its workers offer.

    Raises:
        UsageError: There is no such scheduler, or no workers with what is needed.
        StudyError: It went away meanwhile.
    """
    try:
        import distributed
    except ImportError as error:
        raise UsageError("--dask needs the package 'distributed': pip install -e '.[dask]'") from error
    try:
        client = distributed.Client(address, timeout=_CONNECT_S, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise UsageError(f"no Dask scheduler answers at {address}: {error}; start one with `dask scheduler`") from error
    with _cluster():
        offered = _offered(client)
    if not offered[COMPILE] or not offered[DEVICE]:
        client.close()
        raise UsageError(f"the workers at {address} offer {offered}; {_HINT}")
    return client, offered


def require_cluster(address: str) -> None:
    """Refuse a cluster that cannot serve, before a model is opened for it.

    Raises:
        UsageError: As of `connect`.
    """
    connect(address)[0].close()


def _offered(client: Any) -> dict[str, int]:
    workers = client.scheduler_info(n_workers=-1).get("workers")
    if workers is None:
        # It is trying to reach it again.
        raise ConnectionError("the scheduler does not answer")
    return {name: int(sum(one.get("resources", {}).get(name, 0) for one in workers.values())) for name in (COMPILE, DEVICE)}


def _answer(done: Any, result: Future[Measurement]) -> None:
    """Hand over what a task has answered; what it raised is a defect, or no matter of one configuration, and passes through."""
    from distributed import KilledWorker
    from distributed.client import FutureCancelledError

    try:
        found = done.result()
    except KilledWorker as error:
        found = MeasureError(f"the workers that tried this configuration died of it: {str(error)[:200]}")
    except FutureCancelledError:
        found = StudyError(_GONE)
    except Exception as error:
        found = error
    if isinstance(found, Bound):
        found = EarlyStop(found)
    if isinstance(found, Exception):
        result.set_exception(found)
    else:
        result.set_result(found)


def dask_crew(address: str, evaluator: Evaluator, settings: Settings, lane: Path, say: Progress) -> DaskCrew:
    """The crew of a search.

    Args:
        address: Of the scheduler.
        evaluator: Of the search: what workers open must be the same.
        settings: It was opened with.
        lane: See `lane_file`.
        say: Told of what is waited for.
    """
    identity = {**evaluator.identity, "device_kind": evaluator.device_kind}
    return DaskCrew(address, Errand(settings.to_json(), identity, evaluator.baseline.to_json(), str(lane)), say)
