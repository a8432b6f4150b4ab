"""`compare` over real bundles."""

from __future__ import annotations

import json
from pathlib import Path

from real_search import RealSearch, within


def test_a_bundle_is_the_trial_that_it_was_exported_from(real: RealSearch, bundles: list[Path]) -> None:
    trial = json.loads((bundles[0] / "metrics.json").read_text())["trial"]
    result = within(real.folder, "compare", str(bundles[0]), f"real:{trial}", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["layers"]["differ"] == [] and document["layers"]["count"] == 35
    assert document["a"]["identity"]["model"] == document["b"]["identity"]["model"]
    rows = {row["name"]: row for row in document["metrics"]}
    for name in ("latency_ms", "peak_bytes", "top1_loss_pp", "heldout_top1_loss_pp"):
        assert rows[name]["a"] == rows[name]["b"], name
    assert document["remarks"] == []
