"""Rounded weights are computed once, kept by content, and found again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from networks import images, network

from qsearch.calibrate import input_moments as moments_module
from qsearch.errors import QuantizeError, StudyError
from qsearch.models.content import value_digests
from qsearch.models.graph import Model
from qsearch.qtype import IntRange
from qsearch.quantize.rounding import rounded_weights as store_module
from qsearch.quantize.rounding.rounded_weights import RoundedWeights, WeightGrid

GRID = WeightGrid(IntRange("int8", -8, 7))


@pytest.fixture(scope="module")
def residual() -> Model:
    return network("residual")[0]


def store(model: Model, folder: Path, calls: list[str] | None = None, source: str = "images") -> RoundedWeights:
    def given() -> np.ndarray:
        if calls is not None:
            calls.append("images")
        return images(8)

    return RoundedWeights(model, given, source, folder)


def changed(model: Model, name: str) -> Model:
    weight = model.parameters.weight | {name: model.parameters.weight[name] * np.float32(1.5)}
    return replace(model, parameters=replace(model.parameters, weight=weight))


def test_layers_are_rounded_once_and_found_again(residual: Model, tmp_path: Path) -> None:
    calls: list[str] = []
    first, again = store(residual, tmp_path, calls), store(residual, tmp_path, calls)
    names = [node.name for node in residual.graph.layers]
    made = {name: first.quantized(name, GRID) for name in names}
    assert calls == ["images"] and first.quantized(names[0], GRID) is made[names[0]]
    for name in names:
        found = again.quantized(name, GRID)
        np.testing.assert_array_equal(found.values, made[name].values)
        np.testing.assert_array_equal(found.scale, made[name].scale)
        assert found.values.dtype == np.int8 and found.scale.dtype == np.float32
    assert calls == ["images"] and len(list(tmp_path.iterdir())) == len(names)
    other = again.quantized(names[0], WeightGrid(GRID.limits, "layer_wise"))
    assert len(calls) == 2 and len(set(other.scale.tolist())) == 1
    third = again.quantized(names[0], WeightGrid(GRID.limits, power_of_two=True))
    assert len(calls) == 2
    np.testing.assert_array_equal(
        third.values, store(residual, tmp_path / "fresh").quantized(names[0], WeightGrid(GRID.limits, power_of_two=True)).values
    )


def test_a_changed_late_layer_leaves_the_early_ones(residual: Model, tmp_path: Path) -> None:
    names = [node.name for node in residual.graph.layers]
    store(residual, tmp_path).prepare(names, GRID)
    late = changed(residual, names[-1])
    calls: list[str] = []
    after = store(late, tmp_path, calls)
    for name in names[:-1]:
        after.quantized(name, GRID)
    assert not calls
    after.quantized(names[-1], GRID)
    assert calls and len(list(tmp_path.iterdir())) == len(names) + 1
    store(residual, tmp_path, calls := [], "other images").quantized(names[0], GRID)
    assert calls


def test_digests_follow_what_a_value_depends_on(residual: Model) -> None:
    names = [node.name for node in residual.graph.layers]
    before, after = value_digests(residual, "images"), value_digests(changed(residual, names[2]), "images")
    differing = {name for name in before if before[name] != after[name]}
    assert names[2] in differing and names[1] not in differing and residual.graph.output in differing
    assert not set(before.values()) & set(value_digests(residual, "others").values())
    renamed = {node.name: f"{node.name}.x" for node in residual.graph.nodes}
    nodes = tuple(
        replace(node, name=renamed[node.name], inputs=tuple(renamed[name] for name in node.inputs))
        for node in residual.graph.nodes
    )
    tables = residual.parameters
    moved = replace(
        tables,
        weight={renamed[name]: array for name, array in tables.weight.items()},
        bias={renamed[name]: array for name, array in tables.bias.items()},
    )
    graph = replace(residual.graph, nodes=nodes, output=renamed[residual.graph.output])
    assert list(value_digests(Model("renamed", graph, moved), "images").values()) == list(before.values())


def test_a_damaged_file_is_computed_again(residual: Model, tmp_path: Path) -> None:
    name = residual.graph.layers[0].name
    whole = store(residual, tmp_path)
    whole.prepare([name], GRID)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    for position in np.linspace(0, len(content) - 1, 25).astype(int):
        file.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        again = store(residual, tmp_path)
        again.prepare([name], GRID)
        np.testing.assert_array_equal(again.quantized(name, GRID).values, whole.quantized(name, GRID).values)
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]


def test_progress_counts_images_then_layers(residual: Model, tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []
    rounded = RoundedWeights(residual, lambda: images(7), "images", tmp_path, lambda *now: said.append(now))
    rounded.quantized(residual.graph.layers[0].name, GRID)
    layers = len(residual.graph.layers)
    assert said[:2] == [("observing layer inputs", 5, 7), ("observing layer inputs", 7, 7)]
    assert said[2:] == [("rounding weights", done, layers) for done in range(1, layers + 1)]


def test_too_wide_a_layer_and_a_folder_that_cannot_be_written(
    residual: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [node.name for node in residual.graph.layers]
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StudyError, match="cannot write the rounded weights"):
        store(residual, blocked).quantized(names[0], GRID)
    monkeypatch.setattr(moments_module, "MAX_READS", 24)
    monkeypatch.setattr(store_module, "MAX_READS", 24)
    wide = next(node.name for node in residual.graph.layers if residual.parameters.weight[node.name][0].size > 24)
    with pytest.raises(QuantizeError, match=rf"{wide}.*more than 24 values.*nearest"):
        store(residual, tmp_path / "rounded").quantized(wide, GRID)
