"""Several processes at one study: turns, members, workers that come, go and die, on SQLite and on PostgreSQL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import sqlalchemy
from analytic import AnalyticEvaluator, invoke
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState
from postgres import Postgres, running_postgres

from qsearch.errors import StudyError
from qsearch.search.bound_space import bind_space
from qsearch.search.locks import TurnLost, Turns, lane_file, lane_held
from qsearch.search.loop.driver import Limits, SearchProblem, run_search
from qsearch.search.members import MEMBER, Heartbeat, gone, this_member
from qsearch.search.samplers import make_sampler
from qsearch.search.space import load_space
from qsearch.search.storage import open_storage
from qsearch.search.study import Identity, StudyHandle, load_study, study_to_search
from qsearch.search.study_trials import measured_trials, reap_trials
from qsearch.session.local_workers import local_workers

SCRIPT = str(Path(__file__).parents[1] / "analytic.py")
BUDGET = 24
SEARCH = ("search", "--budget", str(BUDGET), "--restarts", "0", "--sampler", "random", "--study", "shared")
WORKER = ("worker", "--restarts", "0", "--study", "shared")
ANALYTIC = bind_space(load_space("default"), AnalyticEvaluator().graph)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A server for all tests of this file; each has a study of its own name or a database that was emptied."""
    with running_postgres() as server:
        yield server


def start(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """A command over the analytic network, under way."""
    command = [sys.executable, SCRIPT, *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=os.environ | variables, text=True, **pipes)


def wait_for(condition: Callable[[], bool]) -> None:
    """Until something is so."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def trials(url: str, study: str = "shared") -> list[FrozenTrial]:
    """All of a study; none before there is one."""
    try:
        return load_study(study, url).study.get_trials()
    except StudyError:
        return []


def measured_by(url: str) -> Counter[int]:
    """Process -> trials that it has measured."""
    done = [one for one in trials(url) if one.state == TrialState.COMPLETE]
    return Counter(one.user_attrs[MEMBER]["process"] for one in done)


def check_exact(url: str, budget: int = BUDGET) -> None:
    """The budget is met to the trial, nothing was measured twice, nothing is left running."""
    found = trials(url)
    hashes = [one.user_attrs["config_hash"] for one in found if one.state == TrialState.COMPLETE]
    assert len(hashes) == len(set(hashes)) == budget
    assert not [one for one in found if one.state == TrialState.RUNNING]


def search_with_workers(folder: Path, url: str, meanwhile: Callable[[list[subprocess.Popen[str]]], None]) -> list[int]:
    """A search and two workers at its study; what happens meanwhile is done to the three. Returns their exit statuses."""
    slow = {"TROUBLE": "slow"}
    members = [start(folder, *SEARCH, "--storage", url, "--json", **slow)]
    wait_for(lambda: bool(measured_by(url)))
    members += [start(folder, *WORKER, "--storage", url, "--json", **slow) for _ in range(2)]
    wait_for(lambda: len(measured_by(url)) == 3)
    meanwhile(members)
    told = [member.communicate(timeout=120)[1] for member in members]
    print(*told, sep="\n")
    return [member.returncode for member in members]


def kill_a_worker(members: list[subprocess.Popen[str]]) -> None:
    members[1].send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_workers_share_a_study_in_a_file_and_one_is_killed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    assert search_with_workers(tmp_path, url, kill_a_worker) == [0, -signal.SIGKILL, 0]
    check_exact(url)
    failed = [one for one in trials(url) if one.state == TrialState.FAIL]
    assert all(one.user_attrs["error"].startswith("the process that tried it has gone") for one in failed)
    assert len(measured_by(url)) == 3


@pytest.mark.slow
def test_workers_share_a_study_on_a_server_that_crashes(tmp_path: Path, postgres: Postgres) -> None:
    def crash(members: list[subprocess.Popen[str]]) -> None:
        postgres.stop()
        time.sleep(2)
        postgres.start()
        kill_a_worker(members)

    assert search_with_workers(tmp_path, postgres.url, crash) == [0, -signal.SIGKILL, 0]
    check_exact(postgres.url)
    # The front was measured again, by the search alone.
    assert load_study("shared", postgres.url).study.user_attrs["run"]["budget"] == BUDGET


def made_at_once(url: str) -> None:
    """Six open a database that is not there, or is empty, at the same moment."""
    together = threading.Barrier(6)

    def opened(_: int) -> list[str]:
        together.wait()
        return [one.study_name for one in open_storage(url, create=True).get_all_studies()]

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(opened, range(6))) == [[]] * 6


@pytest.mark.parametrize("attempt", range(5))
def test_a_file_that_several_make_at_once_is_made(tmp_path: Path, attempt: int) -> None:
    made_at_once(f"sqlite:///{tmp_path}/study.db")


def test_tables_that_several_make_at_once_on_a_server_are_made(postgres: Postgres) -> None:
    for name in ("first", "second", "third"):
        engine = sqlalchemy.create_engine(postgres.url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        made_at_once(postgres.url.removesuffix("postgres") + name)


def test_a_worker_is_told_what_it_cannot_work_on(tmp_path: Path) -> None:
    assert "no study database" in invoke(tmp_path, *WORKER).output
    assert invoke(tmp_path, "search", "--budget", "3", "--study", "shared").exit_code == 0
    other = invoke(tmp_path, *WORKER, DEVICE="another processor")
    assert other.exit_code != 0
    assert "device_kind was 'formulas', is 'another processor'" in " ".join(other.output.split())
    assert "model was" in invoke(tmp_path, *WORKER, MODEL="n" * 64).output
    done = invoke(tmp_path, *WORKER, "--json")
    assert json.loads(done.stdout)["measured"] == 3


@pytest.mark.slow
def test_workers_that_a_search_keeps_beside_itself(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    assert start(tmp_path, *SEARCH[:2], "2", *SEARCH[3:], "--storage", url).wait(timeout=60) == 0
    handle = load_study("shared", url)
    handle.study.set_user_attr("run", handle.study.user_attrs["run"] | {"budget": 12})
    said: list[str] = []
    with chdir(tmp_path), local_workers(handle, 2, (sys.executable, SCRIPT), said.append):
        wait_for(lambda: len(measured_trials(handle.study)) == 12)
    check_exact(url, 12)
    assert not said
    # What one of them had to say is not lost.
    with chdir(tmp_path), local_workers(handle, 1, (sys.executable, "-c", "import sys; sys.exit('cannot')"), said.append):
        time.sleep(1)
    assert said == ["one of 1 workers ended with status 1: cannot"]


@pytest.mark.slow
def test_a_random_search_is_the_same_whoever_asks(tmp_path: Path) -> None:
    """Serial and side by side, with the same seed, the same configurations up to their order."""
    found = []
    for name, processes in (("one", 1), ("three", 3)):
        url = f"sqlite:///{tmp_path}/{name}.db"
        with study_to_search(name, Identity({"model": "a"}), url) as handle:
            handle.study.sampler = make_sampler("random", 7, 0)
            problem = SearchProblem(ANALYTIC, AnalyticEvaluator().evaluate, anchored=False)
            run_search(handle, problem, Limits(2))
            script = (
                "import sys; from test_sharing import *\n"
                f"handle = load_study({name!r}, {url!r}); handle.study.sampler = make_sampler('random', 7, 2)\n"
                "run_search(handle, SearchProblem(ANALYTIC, AnalyticEvaluator().evaluate, anchored=False), Limits(14))"
            )
            paths = os.pathsep.join(
                [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
            )
            environment = os.environ | {"PYTHONPATH": paths}
            members = [subprocess.Popen([sys.executable, "-c", script], env=environment) for _ in range(processes)]
            assert [member.wait(timeout=120) for member in members] == [0] * processes
            assert len(measured_trials(handle.study)) == 14
            found.append({trial.user_attrs["config_hash"] for trial in measured_trials(handle.study)})
    assert found[0] == found[1]


def test_turns_exclude_each_other(tmp_path: Path, postgres: Postgres) -> None:
    for url in (f"sqlite:///{tmp_path}/a.db", postgres.url):
        one, two, other = Turns("s", url), Turns("s", url), Turns("t", url)
        with one.turn():
            assert not two_takes(two)
            assert two_takes(other)
        assert two_takes(two)


def two_takes(turns: Turns) -> bool:
    """Whether a turn is to be had at once."""
    import qsearch.search.locks as locks

    patience, locks.PATIENCE_S = locks.PATIENCE_S, 0.1
    try:
        with turns.turn():
            return True
    except StudyError as error:
        assert "has kept study" in str(error)
        return False
    finally:
        locks.PATIENCE_S = patience


def test_a_turn_that_the_server_took_back_is_known_to_be_lost(tmp_path: Path, postgres: Postgres) -> None:
    turns = Turns("lost", postgres.url)
    engine = sqlalchemy.create_engine(postgres.url, isolation_level="AUTOCOMMIT")
    with pytest.raises(TurnLost), turns.turn(), engine.connect() as connection:
        end = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
        connection.execute(sqlalchemy.text(end))
    with turns.turn():
        pass
    engine.dispose()


def test_a_trial_asked_for_in_a_lost_turn_is_asked_for_again(tmp_path: Path) -> None:
    """What was begun in it may have been begun by others as well: it is failed and its configuration tried again."""
    with study_to_search("demo", Identity({"model": "a"}), f"sqlite:///{tmp_path}/a.db") as handle:
        handle.study.sampler = make_sampler("random", 0, 0)
        evaluator, lost = AnalyticEvaluator(), []
        handle = StudyHandle(handle.study, handle.url, LosingTurns(lost))  # type: ignore[arg-type]
        run_search(handle, SearchProblem(ANALYTIC, evaluator.evaluate), Limits(6))
        assert lost and len(evaluator.measured) == len(set(evaluator.measured)) == 6
        failed = [one for one in handle.study.get_trials() if one.state == TrialState.FAIL]
        assert failed and all("TurnLost" in one.user_attrs["error"] for one in failed)


def test_a_trial_that_others_failed_while_it_was_asked_for_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is restarted gives a turn to two: to the second, what the first has just begun is nobody's."""
    with study_to_search("demo", Identity({"model": "a"}), f"sqlite:///{tmp_path}/a.db") as handle:
        handle.study.sampler = make_sampler("random", 0, 0)
        evaluator, ask, asked = AnalyticEvaluator(), handle.study.ask, []

        def ask_beside_another(*arguments: Any) -> Any:
            asked.append(ask(*arguments))
            if len(asked) in (2, 5):
                assert reap_trials(handle.study) == 1
            return asked[-1]

        monkeypatch.setattr(handle.study, "ask", ask_beside_another)
        run_search(handle, SearchProblem(ANALYTIC, evaluator.evaluate), Limits(6))
        assert len(evaluator.measured) == len(set(evaluator.measured)) == len(measured_trials(handle.study)) == 6
        assert not [one for one in handle.study.get_trials() if one.state == TrialState.RUNNING]


class LosingTurns:
    """Turns of which every third is lost."""

    def __init__(self, lost: list[int]) -> None:
        self.lost, self.count = lost, 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        yield
        self.count += 1
        if self.count % 3 == 0:
            self.lost.append(self.count)
            raise TurnLost


def test_who_is_gone() -> None:
    mine = this_member()

    def trial(**member: Any) -> Any:
        return SimpleNamespace(user_attrs={MEMBER: mine | member} if member else {}, _trial_id=5)

    assert gone(trial(), set())
    # This process lives, but none of its searches has it.
    assert gone(trial(process=os.getpid()), set())
    heart = Heartbeat(InMemoryStorage())
    assert not gone(trial(**heart.member), {5})
    heart.close()
    assert gone(trial(**heart.member), set())
    parent = {"process": os.getppid(), "started": Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]}
    assert not gone(trial(**parent), set())
    assert gone(trial(**parent), {5})
    assert gone(trial(started="1"), set())
    assert gone(trial(process=2**22 + 1), set())
    assert not gone(trial(machine="another"), {4})
    assert gone(trial(machine="another"), {5})


def test_a_silent_trial_of_another_machine_is_taken_over(tmp_path: Path) -> None:
    with study_to_search("demo", Identity({"model": "a"}), f"sqlite:///{tmp_path}/a.db") as handle:
        trial = handle.study.ask(ANALYTIC.distributions())
        trial.set_user_attr(MEMBER, this_member() | {"machine": "another"})
        handle.storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]
        assert reap_trials(handle.study) == 0
        engine = sqlalchemy.create_engine(handle.url)
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-10 minutes')"))
        engine.dispose()
        assert reap_trials(handle.study) == 1
        with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
            trial.set_user_attr("late", True)


def test_a_trial_that_others_took_over_is_theirs(tmp_path: Path) -> None:
    """A process that was not heard of for long goes on; what it measured then counts for nobody."""
    with study_to_search("demo", Identity({"model": "a"}), f"sqlite:///{tmp_path}/a.db") as handle:
        handle.study.sampler = make_sampler("random", 0, 0)
        evaluator = AnalyticEvaluator()

        def evaluate(config: Any) -> Any:
            if len(evaluator.measured) == 2:
                handle.study.tell(handle.study.get_trials()[-1].number, state=TrialState.FAIL)
            return evaluator.evaluate(config)

        problem = SearchProblem(ANALYTIC, evaluate, anchored=False)
        assert run_search(handle, problem, Limits(5)).completed == 5
        assert len(measured_trials(handle.study)) == 5 and len(evaluator.measured) == 6


def test_one_lane_on_a_machine(tmp_path: Path) -> None:
    lane = lane_file("study", f"sqlite:///{tmp_path}/a.db")
    assert lane != lane_file("other", f"sqlite:///{tmp_path}/a.db")
    assert lane == lane_file("study", f"sqlite:///{tmp_path}/sub/../a.db")
    script = f"""
import time
from pathlib import Path
from qsearch.search.locks import lane_held
with lane_held(Path({str(lane)!r})):
    print("in", flush=True)
    time.sleep(1)
    Path({str(tmp_path / "out")!r}).touch()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        with lane_held(lane):
            assert (tmp_path / "out").exists()
    lane.unlink()
