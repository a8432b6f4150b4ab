"""The front measured again in a process of its own: nothing of the search is left in its memory and caches.

Run as a module it is that process: it reads request.json in the folder it is given and writes result.json beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qsearch.config import QuantConfig
from qsearch.errors import QSearchError, StudyError
from qsearch.measure.measurement import Accuracy, Latency, Measurement
from qsearch.search.evaluation.evaluator import Settings
from qsearch.search.front import accuracy_from_json, measurement_from_json

__all__ = ["main", "remeasure"]

_REQUEST, _RESULT = "request.json", "result.json"


def remeasure(settings: Settings, baseline: Measurement, configs: Sequence[QuantConfig]) -> list[tuple[Latency, Accuracy]]:
    """Measure configurations in a fresh process: time in turns with float, accuracy on the held-out images.

    Args:
        settings: The study's.
        baseline: The float module that latencies are counted against.
        configs: What to measure.

    Returns:
        A (latency, accuracy) per configuration.

    Raises:
        StudyError: The process failed.
    """
    request = {
        "settings": settings.to_json(),
        "baseline": baseline.to_json(),
        "configs": [config.to_json() for config in configs],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / _REQUEST).write_text(json.dumps(request), encoding="utf-8")
        done = _run_fresh(folder)
        found = json.loads((folder / _RESULT).read_text(encoding="utf-8")) if (folder / _RESULT).is_file() else {}
    if "verdicts" not in found:
        lines = done.stderr.strip().splitlines()
        reason = found.get("error") or (lines[-1] if lines else f"exit status {done.returncode}")
        raise StudyError(
            f"the front could not be measured again in a process of its own: {reason}. Every trial is kept; the same command "
            "tries once more"
        )
    return [(Latency(**latency), accuracy_from_json(accuracy)) for latency, accuracy in found["verdicts"]]


def _run_fresh(folder: Path) -> subprocess.CompletedProcess[str]:
    """Let a process of its own answer the request in a folder."""
    # A user's own model is found where this process found it.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-m", "qsearch.search.evaluation.remeasure", str(folder)]
    return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def main(folder: Path) -> None:
    """Answer the request in a folder."""
    from qsearch.search.evaluation.objective import prepare_evaluator

    request = json.loads((folder / _REQUEST).read_text(encoding="utf-8"))
    try:
        evaluator = prepare_evaluator(Settings.from_json(request["settings"]), lambda clause: None)
        evaluator.refer_to(measurement_from_json(request["baseline"]))
        verdicts = evaluator.measure_again([QuantConfig.model_validate(config) for config in request["configs"]])
        result: dict[str, Any] = {"verdicts": [(vars(latency), vars(accuracy)) for latency, accuracy in verdicts]}
    except QSearchError as error:
        result = {"error": str(error)}
    (folder / _RESULT).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
