"""What a search needs to know of the thing it searches: settings in, measurements out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qsearch.config import QuantConfig
from qsearch.measure.measurement import Accuracy, Latency, Measurement, Task
from qsearch.models.graph import Graph
from qsearch.search.bound_space import BoundSpace
from qsearch.search.loop.early_stopping import StoppingRule
from qsearch.search.loop.pipeline import Pipeline
from qsearch.search.profile import Profile

if TYPE_CHECKING:
    # Loads torch and TVM, which reading a study needs neither of.
    from qsearch.search.tables.layer_tables import Draft, Tables

__all__ = ["CACHE", "Evaluator", "Progress", "Settings", "said_once"]

CACHE = Path("studies/cache")

# Called with a clause such as 'measuring the float module' whenever a slow step begins.
Progress = Callable[[str], None]


def said_once(progress: Progress, clause: str) -> Callable[[int, int], None]:
    """A counter callback that reports only the first time."""
    said: list[Any] = []

    def report(done: int, total: int) -> None:
        if not said:
            said.append(True)
            progress(f"{clause} ({total})")

    return report


# Images that are known by a name, from any folder.
_BUILT_IN = Path("demo")
_PATHS = ("weights", "data", "preprocessing", "cache_dir", "cost_table")


@dataclass(frozen=True)
class Settings:
    """What is searched, and on what.

    Attributes:
        model: 'demo', 'efficientnet_lite0', 'torchvision:NAME', 'package.module:factory' or a .pt2 file.
        weights: A local checkpoint; None for the model's own.
        data: A directory of labelled images; None for the model's own.
        target: CPU to compile for.
        convert_channels: Accept images whose channel count is not the model's and convert them.
        preprocessing: A file that overrides the model's preprocessing.
        seed: Of every random choice: the split of the images, the sampler.
        cache_dir: Where kernels and statistics are kept between runs.
        threads: Threads a module runs on.
        task: What the model is for; None for what the model itself says.
        cost_table: Kernel times of a device that is not here; None to time modules on this machine.
        rpc: HOST:PORT of an RPC tracker whose device times modules; None for this machine.
        rpc_key: The key of that device.
        batch: Images of one inference.
    """

    model: str = "demo"
    weights: Path | None = None
    data: Path | None = None
    target: str = "llvm"
    convert_channels: bool = False
    preprocessing: Path | None = None
    seed: int = 0
    cache_dir: Path = CACHE
    threads: int = 1
    task: Task | None = None
    cost_table: Path | None = None
    rpc: str | None = None
    rpc_key: str | None = None
    batch: int = 1

    def to_json(self) -> dict[str, Any]:
        """Plain types, with absolute paths, so that a study can be exported from any folder."""
        data = asdict(self)
        paths = {name: None if data[name] is None else str(data[name].resolve()) for name in _PATHS}
        if self.data == _BUILT_IN:
            paths["data"] = str(_BUILT_IN)
        model = str(Path(self.model).resolve()) if self.model.endswith(".pt2") else self.model
        return data | paths | {"model": model}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Settings:
        """The inverse of `to_json`."""
        # Studies of older versions do not have all of them.
        return cls(**data | {name: Path(data[name]) for name in _PATHS if data.get(name) is not None})


class Evaluator(Protocol):
    """A model, its images and a target, ready to measure configurations."""

    @property
    def graph(self) -> Graph:
        """The layer graph."""
        ...

    @property
    def identity(self) -> dict[str, str]:
        """Fingerprints of model, data and target, by these names."""
        ...

    @property
    def profile(self) -> Profile:
        """The defaults of what the model is for."""
        ...

    @property
    def baseline(self) -> Measurement:
        """The module with every layer in fp32."""
        ...

    def refer_to(self, baseline: Measurement) -> None:
        """Count latencies against a float module that was measured before, as a continued study has to."""
        ...

    def keep_to(self, lane: Path, crowded: bool = False) -> None:
        """Measure only while nobody else does who keeps to the same lane; crowded where others surely work on this machine."""
        ...

    @property
    def device_kind(self) -> str:
        """What is measured on: latencies of different kinds do not belong in one study."""
        ...

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent on getting ready: float_pass and others."""
        ...

    def evaluate(self, config: QuantConfig, rule: StoppingRule | None = None) -> Measurement:
        """Lower, compile, link and measure one configuration on the search images.

        Raises:
            TrialError: This configuration cannot be built or measured; others may.
            EarlyStop: The rule has seen enough.
        """
        ...

    def pipeline(self, jobs: int) -> AbstractContextManager[Pipeline | None]:
        """Measure configurations in a process of its own; None for one job."""
        ...

    def kernels_sha256(self, config: QuantConfig) -> str:
        """Digest of the kernels that a configuration's module would be linked from now; another tile or generator changes it.

        Raises:
            TrialError: This configuration cannot be built.
        """
        ...

    def idle_methods(self) -> Collection[str]:
        """Methods that find nothing to do in the model, by their names in a configuration."""
        ...

    def draft(self, space: BoundSpace, setting: Mapping[str, Any]) -> Draft:
        """What trials can be planned with while there are no tables yet.

        Args:
            space: The search space.
            setting: Values of the parameters that are no layer's.
        """
        ...

    def tables(self, space: BoundSpace, mixed: bool = True, tried: Sequence[QuantConfig] = ()) -> Tables:
        """The planner's tables.

        Args:
            space: The search space.
            mixed: Whether layers cost what they do among others of other precisions; else as in uniform networks.
            tried: Measured configurations, whose modules then tell the times of kernels as well.
        """
        ...

    def verify_front(self, configs: Sequence[QuantConfig]) -> list[tuple[Latency, Accuracy]]:
        """Measure configurations again in a fresh process: latency interleaved with float, accuracy on the held-out images."""
        ...
