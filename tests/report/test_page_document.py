"""What a report page is told of a study."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from analytic import invoke
from hostile_study import NAMES, hostile_study

from qsearch.config import QuantConfig
from qsearch.report.page_document import export_command, layers_of, page_document
from qsearch.search.study import load_study


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("document")
    assert invoke(folder, "search", "--budget", "12").exit_code == 0
    return folder


def test_document_has_the_points_of_the_front_and_their_layers_in_order(searched: Path) -> None:
    handle = load_study("demo", f"sqlite:///{searched}/studies/demo.db")
    document = page_document(handle)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    front = [point for point in document["points"] if point["kind"] == "front"]
    assert [point["trial"] for point in front] == [point["trial"] for point in document["study"]["front"]]
    # In the order of the network: by name, the classifier would be the first.
    names = [layer["name"] for layer in document["layers"]]
    assert names[0] == "features.0.conv.0" and names[-1] == "classifier" and len(names) == 8
    assert document["layers"][2] == {"name": "features.0.conv.2", "type": "depthwise", "weights": 72}
    for point in front:
        assert point["precisions"] == [point["config"]["precision"][name] for name in names]
        assert sum(point["counts"].values()) == 8
    assert set(document["picks"]) == {"knee", "fastest", "smallest", "most-accurate"}
    assert set(document["picks"].values()) <= {point["name"] for point in front}
    assert len(document["others"]) + len(document["points"]) == 12
    facts = {one["title"]: dict(one["rows"]) for one in document["facts"]}
    assert facts["Search"]["sampler"] == "planner" and facts["Search"]["space"] == "default"
    assert facts["Versions"]["qsearch"] and facts["Machine"]["processors"]


def test_history_grows_to_the_hypervolume_of_the_front_as_the_search_saw_it(searched: Path) -> None:
    document = page_document(load_study("demo", f"sqlite:///{searched}/studies/demo.db"))
    volumes = [step["hypervolume"] for step in document["history"]]
    assert len(volumes) == 12 and volumes == sorted(volumes)
    assert {step["fate"] for step in document["history"]} == {"measured"}
    # Nothing was dropped, so that both count the same points.
    assert document["study"]["dropped"] == []
    assert volumes[-1] == pytest.approx(document["study"]["hypervolume"])


def test_export_command_is_one_that_a_shell_takes_from_any_folder(searched: Path) -> None:
    handle = load_study("demo", f"sqlite:///{searched}/studies/demo.db")
    words = shlex.split(export_command(handle, 3))
    assert words[:2] == ["qsearch", "export"]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert options["--study"] == "demo" and options["--trial"] == "3"
    assert options["--storage"] == f"sqlite:///{(searched / 'studies/demo.db').resolve()}"
    # Read as the command would read it.
    assert load_study("demo", options["--storage"]).name == "demo"


def test_a_study_without_points_and_one_that_no_trial_satisfies(tmp_path: Path) -> None:
    assert invoke(tmp_path, "search", "--timeout", "0").exit_code == 0
    empty = page_document(load_study("demo", f"sqlite:///{tmp_path}/studies/demo.db"))
    assert empty["points"] == empty["history"] == [] and empty["picks"] == {}
    assert invoke(tmp_path, "search", "--study", "tight", "--budget", "4", "--max-latency-ms", "0.1").exit_code == 3
    tight = page_document(load_study("tight", f"sqlite:///{tmp_path}/studies/tight.db"))
    assert [point["kind"] for point in tight["points"]] == ["closest"] * 3
    assert {step["fate"] for step in tight["history"]} == {"infeasible"}
    assert dict(tight["facts"][0]["rows"])["constraints"] == "latency_ms <= 0.1"


def test_a_study_of_an_older_version(tmp_path: Path) -> None:
    document = page_document(hostile_study(tmp_path, ("block.10", "block.9", "a"), old=True))
    assert [layer["name"] for layer in document["layers"]] == ["a", "block.9", "block.10"]
    assert {layer["type"] for layer in document["layers"]} == {None}
    assert document["tables"] == [] and document["points"]
    assert all(len(point["precisions"]) == 3 for point in document["points"])
    titles = {one["title"]: one["rows"] for one in document["facts"]}
    assert titles["Machine"] == titles["Versions"] == []


def test_layers_without_a_record_come_in_the_order_of_the_tables() -> None:
    config = QuantConfig.model_validate({"precision": {"a": "int8", "b": "int8", "z": "fp32"}})
    tables = [{"layer": "b", "position": 0}, {"layer": "a", "position": 1}]
    assert [one["name"] for one in layers_of({}, tables, [config])] == ["b", "a", "z"]


def test_hostile_names_stay_what_they_are(tmp_path: Path) -> None:
    document = page_document(hostile_study(tmp_path))
    assert [layer["name"] for layer in document["layers"]] == list(NAMES)
    assert document["points"][0]["precisions"]
