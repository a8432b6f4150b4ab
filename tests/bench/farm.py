"""Workers, devices, a study and its storage as queues: what `simulation.py` runs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import simpy

__all__ = ["ADVICE", "Farm", "Run", "simulate"]

# Of a run: trials in all, trials per worker; and the part of them that counts, without the beginning, when queues fill, and the
# end, when nobody asks any more.
LEAST_TRIALS, TRIALS_PER_WORKER, COUNTED = 1500, 12, (0.25, 0.8)
MOST_ATTEMPTS = 2
# What would help where a resource is what all others wait for.
ADVICE = {
    "building": "more workers; or a warm kernel cache",
    "measuring": "more workers; or fewer search images",
    "devices": "more devices; or fewer repeats of a timing",
    "asking": "several studies, or a sampler that answers sooner: more workers gain nothing",
    "storage": "fewer transactions a trial, or a faster database: more workers gain nothing",
}

Row = Mapping[str, float]
Steps = Iterator[Any]


@dataclass(frozen=True)
class Farm:
    """What is simulated.

    Attributes:
        workers: That carry out trials.
        devices: Places where one module at a time is timed.
        rows: Seconds of the steps of measured trials: ask, build, latency, accuracy, tell; without the storage's.
        storage_s: Seconds of a transaction, as measured.
        lanes: Transactions that the storage carries out at once.
        transactions: Of asking and of telling.
        deaths_per_s: Of each worker.
        heartbeat_s: After which a trial of a dead worker is taken for lost.
        restart_s: What a worker that has died takes to come back.
        pipelined: Whether a worker builds the next trial while one is measured.
    """

    workers: int
    devices: int
    rows: Sequence[Row]
    storage_s: Sequence[float]
    lanes: int = 1
    transactions: tuple[int, int] = (20, 20)
    deaths_per_s: float = 0.0
    heartbeat_s: float = 120.0
    restart_s: float = 10.0
    pipelined: bool = True

    @property
    def bounds(self) -> dict[str, float]:
        """Trials per second that each resource would carry out if it never waited."""
        mean = {step: sum(row[step] for row in self.rows) / len(self.rows) for step in self.rows[0]}
        storage = sum(self.storage_s) / len(self.storage_s)
        ask, tell = (count * storage for count in self.transactions)
        building = mean["ask"] + ask + mean["build"] + mean["tell"] + tell
        measuring = mean["latency"] + mean["accuracy"]
        alone = 0.0 if self.pipelined else building + measuring
        found = {"building": self.workers / max(building, alone), "measuring": self.workers / max(measuring, alone)}
        found |= {"devices": self.devices / mean["latency"], "asking": 1 / (mean["ask"] + ask)}
        return found | {"storage": self.lanes / (ask + tell) if ask + tell else float("inf")}


@dataclass
class Trial:
    """A trial under way: what its steps take, and how often it was begun."""

    number: int
    row: Row
    attempt: int = 1


@dataclass
class Run:
    """One simulation.

    Attributes:
        farm: What is simulated.
        wanted: Trials in all.
        random: Source of randomness.
        asked: Trials that were given out, each counted once.
        ended: When each trial ended, by its number, and whether it was measured; the others were given up.
        begun: How often each trial was begun.
        busy: Seconds that each resource was at work, all its places together.
    """

    farm: Farm
    wanted: int
    random: random.Random
    asked: int = 0
    ended: list[tuple[int, float, bool]] = field(default_factory=list)
    begun: dict[int, int] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ADVICE, 0.0))
    lost: list[Trial] = field(default_factory=list)

    def run(self) -> None:
        """Simulate until every trial has ended."""
        self.env = simpy.Environment()
        self.study, self.storage = simpy.Resource(self.env, 1), simpy.Resource(self.env, self.farm.lanes)
        self.devices = simpy.Resource(self.env, self.farm.devices)
        self.done, self.returned = self.env.event(), self.env.event()
        for _ in range(self.farm.workers):
            self.env.process(self.worker())
        self.env.run(self.done)

    def worker(self) -> Steps:
        """Live, die, come back."""
        while True:
            holds: list[Trial] = []
            life = self.env.process(self.live(holds))
            if not self.farm.deaths_per_s:
                return
            yield self.env.timeout(self.random.expovariate(self.farm.deaths_per_s))
            life.interrupt()
            for trial in holds:
                self.env.process(self.reap(trial))
            yield self.env.timeout(self.farm.restart_s)

    def live(self, holds: list[Trial]) -> Steps:
        """One trial is measured while the one before is told and the next one asked for and built."""
        under_way: tuple[Trial, simpy.Process] | None = None
        try:
            while True:
                ahead = None
                if self.lost or self.asked < self.wanted:
                    ahead = yield from self.ask(holds)
                if ahead is not None:
                    with self.at_work("building"):
                        yield self.env.timeout(ahead.row["build"])
                if under_way is not None:
                    yield under_way[1]
                done, under_way = under_way, None if ahead is None else (ahead, self.env.process(self.measure(ahead)))
                if under_way is not None and not self.farm.pipelined:
                    yield under_way[1]
                    done, under_way = under_way, None
                if done is not None:
                    yield from self.tell(done[0], holds)
                elif under_way is None:
                    yield self.returned
        except simpy.Interrupt:
            if under_way is not None and under_way[1].is_alive:
                under_way[1].interrupt()

    def ask(self, holds: list[Trial]) -> Steps:
        """The next trial: one that was lost, or a new one; None where somebody else was quicker."""
        with self.study.request() as turn:
            yield turn
            if not self.lost and self.asked == self.wanted:
                return None
            if self.lost:
                trial = self.lost.pop(0)
            else:
                trial = Trial(self.asked, self.random.choice(self.farm.rows))
                self.asked += 1
            holds.append(trial)
            self.begun[trial.number] = self.begun.get(trial.number, 0) + 1
            with self.at_work("asking"):
                with self.at_work("building"):
                    yield self.env.timeout(trial.row["ask"])
                yield from self.transact(self.farm.transactions[0])
        return trial

    def measure(self, trial: Trial) -> Steps:
        """Time it on a device, then score it."""
        try:
            with self.devices.request() as turn:
                yield turn
                with self.at_work("devices"), self.at_work("measuring"):
                    yield self.env.timeout(trial.row["latency"])
            with self.at_work("measuring"):
                yield self.env.timeout(trial.row["accuracy"])
        except simpy.Interrupt:
            return

    def tell(self, trial: Trial, holds: list[Trial]) -> Steps:
        """Write down how it ended."""
        with self.at_work("building"):
            yield self.env.timeout(trial.row["tell"])
        yield from self.transact(self.farm.transactions[1])
        holds.remove(trial)
        self.end(trial, True)

    def reap(self, trial: Trial) -> Steps:
        """Notice that a worker has died; its trial is tried once more and then given up."""
        yield self.env.timeout(self.farm.heartbeat_s)
        if trial.attempt == MOST_ATTEMPTS:
            self.end(trial, False)
            return
        self.lost.append(replace(trial, attempt=trial.attempt + 1))
        self.returned.succeed()
        self.returned = self.env.event()

    def end(self, trial: Trial, measured: bool) -> None:
        """A trial has ended."""
        self.ended.append((trial.number, self.env.now, measured))
        if len(self.ended) == self.wanted:
            self.done.succeed()

    def transact(self, count: int) -> Steps:
        """So many transactions, one after the other; whoever makes them waits."""
        if not count:
            return
        with self.storage.request() as turn:
            yield turn
            with self.at_work("storage"), self.at_work("building"):
                yield self.env.timeout(sum(self.random.choices(self.farm.storage_s, k=count)))

    @contextmanager
    def at_work(self, resource: str) -> Iterator[None]:
        """Count what the block takes, dead workers' part of it included."""
        start = self.env.now
        try:
            yield
        finally:
            self.busy[resource] += self.env.now - start

    def report(self) -> dict[str, Any]:
        """Rates, utilisation, what saturates first, and what would help."""
        ends, farm = sorted(when for _, when, _ in self.ended), self.farm
        first, last = (int(share * len(ends)) for share in COUNTED)
        rate = (last - first) / (ends[last] - ends[first])
        places = {"building": farm.workers, "measuring": farm.workers, "devices": farm.devices, "storage": farm.lanes}
        used = {name: seconds / (places.get(name, 1) * self.env.now) for name, seconds in self.busy.items()}
        most = max(used, key=lambda name: used[name])
        bound = min(farm.bounds, key=lambda name: farm.bounds[name])
        return {
            "workers": farm.workers,
            "devices": farm.devices,
            "trials_per_hour": round(3600 * rate, 1),
            "bound_per_hour": round(3600 * farm.bounds[bound], 1),
            "utilisation": {name: round(value, 3) for name, value in used.items()},
            "busiest": most,
            "bound_by": bound,
            "advice": ADVICE[bound],
            "retried": sum(self.begun.values()) - len(self.begun),
            "given_up": sum(not measured for _, _, measured in self.ended),
        }


def simulate(farm: Farm, seed: int = 0, wanted: int | None = None) -> Run:
    """Run one simulation to its end."""
    run = Run(farm, wanted or max(LEAST_TRIALS, TRIALS_PER_WORKER * farm.workers), random.Random(seed))
    run.run()
    return run
