"""Learned rounding: blocks, what is learned of them, and what is kept of what was learned."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import images, network

from qsearch.calibrate.observe import observe
from qsearch.errors import QuantizeError
from qsearch.models.graph import Model
from qsearch.models.interpret import forward
from qsearch.qtype import IntRange
from qsearch.quantize.affine import affine_from_range
from qsearch.quantize.rounding.blocks import blocks_of, divided
from qsearch.quantize.rounding.learned import BlockData, LearnSettings, RoundedLayer, learn_block, run_block
from qsearch.quantize.rounding.learned_network import LearnRequest, learn_network
from qsearch.quantize.weights import quantize_weight, weight_scales

FOUR = IntRange("int8", -8, 7)
SHORT = LearnSettings(iterations=12, checks=3, weight_rate=2e-2, slow_rate=2e-3)


def nearest(model: Model) -> dict[str, RoundedLayer]:
    def one(name: str) -> RoundedLayer:
        weight = model.parameters.weight[name]
        rounded = quantize_weight(weight, weight_scales(weight, FOUR, "channel_wise", "max"), FOUR)
        return RoundedLayer(rounded, np.zeros(len(weight), np.float32))

    return {node.name: one(node.name) for node in model.graph.layers}


def request(model: Model) -> LearnRequest:
    record = observe(model, images(16), 16)
    roundings = {
        (node.name, 0): (affine_from_range(node.name, *(getattr(record.tensors[node.inputs[0]], end) for end in ENDS)),)
        for node in model.graph.layers
    }
    start = nearest(model)
    return LearnRequest(model, start, dict.fromkeys(start, FOUR), roundings, settings=SHORT)


ENDS = ("minimum", "maximum")


@pytest.fixture(scope="module")
def residual() -> LearnRequest:
    return request(network("residual")[0])


def learned(asked: LearnRequest, folder: Path, calls: list[str] | None = None, count: int = 20) -> dict[str, RoundedLayer]:
    def given() -> np.ndarray:
        if calls is not None:
            calls.append("images")
        return images(count, 3)

    return learn_network(asked, given, "images", folder)


def same(one: RoundedLayer, other: RoundedLayer) -> bool:
    pairs = ((one.weight.values, other.weight.values), (one.weight.scale, other.weight.scale), (one.shift, other.shift))
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)


@pytest.mark.parametrize("name", ["residual", "excite", "foreign", "vit"])
def test_blocks_one_after_the_other_are_the_network(name: str) -> None:
    model, data = network(name)[0], torch.tensor(images(4))
    blocks = blocks_of(model.graph)
    assert [node for block in blocks for node in block.nodes] == list(model.graph.nodes[1:])
    value = data
    for block in blocks:
        value = run_block(block.model(model), value, {}, {})
    with torch.no_grad():
        torch.testing.assert_close(value, forward(model, data), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["residual", "excite", "foreign", "vit"])
def test_layers_one_after_the_other_are_the_network(name: str) -> None:
    model, data = network(name)[0], torch.tensor(images(4))
    parts = divided(blocks_of(model.graph), {node.name for node in model.graph.layers})
    assert [node for part in parts for node in part.nodes] == list(model.graph.nodes[1:])
    assert all(len(part.nodes) == 1 for part in parts)
    values = {model.graph.input.name: data}
    for part in parts:
        others = {name: values[name] for name in part.others}
        values[part.nodes[-1].name] = run_block(part.model(model), values[part.source], {}, {}, others)
    with torch.no_grad():
        torch.testing.assert_close(values[model.graph.output], forward(model, data), rtol=1e-4, atol=1e-5)


def test_only_blocks_with_a_layer_alone_are_divided(residual: LearnRequest) -> None:
    blocks = blocks_of(residual.model.graph)
    assert divided(blocks, ()) == blocks
    parts = divided(blocks, {blocks[0].layers[-1]})
    assert parts[len(blocks[0].nodes) :] == blocks[1:]
    assert [part.layers for part in parts if part.layers][: len(blocks[0].layers)] == [(name,) for name in blocks[0].layers]


def test_layers_learned_alone_err_less_than_their_start_and_are_found_again(residual: LearnRequest, tmp_path: Path) -> None:
    asked = replace(residual, alone=frozenset(residual.start))
    calls: list[str] = []
    found, again = learned(asked, tmp_path, calls), learned(asked, tmp_path, calls)
    assert calls == ["images"] and all(same(found[name], again[name]) for name in found)
    assert list(found) == [node.name for node in residual.model.graph.layers]
    first = residual.model.graph.layers[0].name
    (part,) = (one for one in divided(blocks_of(residual.model.graph), asked.alone) if one.layers == (first,))
    data, model = torch.tensor(images(20, 3)), part.model(residual.model)
    target = run_block(model, data, {}, {})
    before, after = (
        float(((run_block(model, data, asked.roundings, {first: layers[first]}) - target)[-4:] ** 2).mean())
        for layers in (residual.start, found)
    )
    assert after < before
    by_block = learned(residual, tmp_path)
    assert any(not same(found[name], by_block[name]) for name in found)


def test_a_residual_network_has_several_blocks(residual: LearnRequest) -> None:
    assert len(blocks_of(residual.model.graph)) > 1


def held_out_error(asked: LearnRequest, layers: dict[str, RoundedLayer], count: int, held: int) -> float:
    data, value = torch.tensor(images(count, 3)), torch.tensor(images(count, 3))
    block = blocks_of(asked.model.graph)[0]
    part = {name: layers[name] for name in block.layers}
    model = block.model(asked.model)
    error = run_block(model, value, asked.roundings, part) - run_block(model, data, {}, {})
    return float((error[-held:] ** 2).mean())


@pytest.mark.parametrize("rate", [2e-2, 5.0])
def test_a_block_is_never_worse_than_its_start_on_held_out_images(residual: LearnRequest, rate: float) -> None:
    block = blocks_of(residual.model.graph)[0]
    model, given = block.model(residual.model), torch.tensor(images(20, 3))
    data = BlockData(given, run_block(model, given, {}, {}), residual.roundings)
    start = {name: residual.start[name] for name in block.layers}
    settings = replace(SHORT, iterations=40, weight_rate=rate)
    found = learn_block(model, start, dict.fromkeys(start, FOUR), data, settings)
    before, after = (held_out_error(residual, layers, 20, 4) for layers in (start, found))
    assert after <= before * 1.0001
    # With any rate for the weights, scales and biases improve rounding to nearest first.
    assert after < 0.95 * before
    for layer in found.values():
        assert FOUR.qmin <= layer.weight.values.min() and layer.weight.values.max() <= FOUR.qmax


def test_equal_seeds_give_equal_bits_and_files_are_found_again(residual: LearnRequest, tmp_path: Path) -> None:
    calls: list[str] = []
    first = learned(residual, tmp_path / "a", calls)
    assert calls == ["images"] and list(first) == [node.name for node in residual.model.graph.layers]
    assert any(not same(first[name], residual.start[name]) for name in first)
    second, found = learned(residual, tmp_path / "b", calls), learned(residual, tmp_path / "a", calls)
    assert len(calls) == 2
    assert all(same(first[name], second[name]) and same(first[name], found[name]) for name in first)


def test_a_late_change_is_learned_from_there_on(residual: LearnRequest, tmp_path: Path) -> None:
    learned(residual, tmp_path)
    before = len(list(tmp_path.iterdir()))
    blocks = blocks_of(residual.model.graph)
    name = blocks[-1].layers[-1]
    moved = RoundedLayer(residual.start[name].weight, residual.start[name].shift + np.float32(0.1))
    said: list[tuple[int, int]] = []
    late = replace(residual, start={**residual.start, name: moved})
    learn_network(late, lambda: images(20, 3), "images", tmp_path, lambda *now: said.append(now))
    assert len(list(tmp_path.iterdir())) == before + len(blocks[-1].layers)
    assert said == [(done, len(blocks)) for done in range(1, len(blocks) + 1)]
    early = blocks[0].layers[0]
    limits = {layer: limit for layer, limit in residual.limits.items() if layer != early}
    learned(replace(residual, limits=limits), tmp_path)
    assert len(list(tmp_path.iterdir())) == before + len(blocks[-1].layers) + sum(len(block.layers) for block in blocks)


def test_blocks_with_nothing_to_learn_stay_and_need_no_images(residual: LearnRequest, tmp_path: Path) -> None:
    calls: list[str] = []
    found = learned(replace(residual, limits={}), tmp_path, calls)
    assert not calls and found == residual.start


def test_layers_that_are_not_learned_keep_their_integers(residual: LearnRequest, tmp_path: Path) -> None:
    fixed = blocks_of(residual.model.graph)[0].layers[0]
    limits = {name: limit for name, limit in residual.limits.items() if name != fixed}
    found = learned(replace(residual, limits=limits), tmp_path)
    assert found[fixed].weight is residual.start[fixed].weight


def test_too_few_images_and_values_that_are_not_finite(residual: LearnRequest, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="at least 5 calibration images, got 1"):
        learned(residual, tmp_path, count=1)
    name = residual.model.graph.layers[0].name
    broken = RoundedLayer(residual.start[name].weight, np.full_like(residual.start[name].shift, np.nan))
    with pytest.raises(QuantizeError, match="NaN or infinity before learning"):
        learned(replace(residual, start={**residual.start, name: broken}), tmp_path)
