"""Search space files: presets, every kind of mistake, the semantic hash."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from analytic import make_graph

from qsearch.config import WeightSettings
from qsearch.errors import SpaceError
from qsearch.search.bound_space import Choices, bind_space
from qsearch.search.space import load_space, preset_names

GRAPH = make_graph()


def write(folder: Path, text: str) -> Path:
    """Write a space file; the version is given unless the text has one."""
    path = folder / "mine.yaml"
    path.write_text(text if "version" in text else f"version: 1\n{text}", encoding="utf-8")
    return path


PRESETS = (
    "default",
    "full",
    "hierarchical",
    "memory_first",
    "performance_optimized",
    "precision_preserving",
    "rule_driven",
)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_bind_and_say_whom_they_are_for(name: str) -> None:
    space = load_space(name)
    assert space.name == name
    assert bind_space(space, GRAPH).parameters
    assert space._source is not None
    assert space._source.path.read_text(encoding="utf-8").startswith("# For whoever")


def test_preset_names() -> None:
    assert preset_names() == list(PRESETS)


BAD = {
    "unknown key": ("precision:\n  default: [int8]\n", ["line 2", "precision", "did you mean 'precisions'"]),
    "unknown nested key": ("calibration:\n  mode: [max]\n", ["line 3", "calibration.mode", "modes"]),
    "unknown precision": ("precisions:\n  default: [int8, int3]\n", ["line 3", "int3", "'fp32'"]),
    "unknown layer type": ("precisions:\n  types:\n    pool: [int8]\n", ["line 4", "pool", "depthwise"]),
    "no choice": ("granularities: []\n", ["line 2", "granularities", "at least one"]),
    "choice twice": ("granularities: [layer_wise, layer_wise]\n", ["line 2", "twice"]),
    "percentile out of range": ("calibration:\n  percentile: [99, 100]\n", ["line 3", "percentile", "100"]),
    "percentile reversed": ("calibration:\n  percentile: [99.9, 99]\n", ["line 2", "low must not be above high"]),
    "percentile not a pair": ("calibration:\n  percentile: 99\n", ["line 3", "percentile"]),
    "number for a list of indices": ("skip_conv_layers: 0\n", ["line 2", "skip_conv_layers"]),
    "bad yaml": ("precisions: [int8\n", ["line 3", "not valid YAML"]),
    "tab": ("precisions:\n\tdefault: [int8]\n", ["line 3", "not valid YAML"]),
    "unknown key of a rule": (
        "rules:\n  - types: [conv]\n    granularity: [layer_wise]\n",
        ["line 4", "granularity", "granularities"],
    ),
    "a rule for nothing": ("rules:\n  - precisions: [int8]\n", ["line 3", "types"]),
    "migration out of range": ("migrations: [0.0, 1.5]\n", ["line 2", "migrations", "1.5"]),
    "switch as text": ("equalizations: ['on']\n", ["line 2", "equalizations"]),
    "start out of place": ("start:\n  modes: [max]\n", ["line 3", "start.modes"]),
    "key twice": ("skip: []\nskip: [classifier]\n", ["line 3", "'skip'", "line 2"]),
    "wrong version": ("version: 2\n", ["line 1", "version: 1", "2"]),
    "version as text": ("version: '1'\n", ["version: 1", "'1'"]),
    "a list": ("- version\n", ["mapping", "list"]),
    "empty": ("# version\n", ["mapping"]),
}


@pytest.mark.parametrize("text, parts", BAD.values(), ids=BAD.keys())
def test_bad_files_are_refused_with_place_key_and_way_out(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SpaceError) as caught:
        load_space(path)
    for part in [str(path), *parts]:
        assert part in str(caught.value)


def test_version_is_required(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: a\n")
    with pytest.raises(SpaceError, match="none is given"):
        load_space(path)


UNBINDABLE = {
    "skip glob": ("skip: ['nothing.*']\n", ["line 2", "'nothing.*'", "matches no layer", "features.0.conv.0"]),
    "layer glob": ("precisions:\n  layers:\n    head.*: [fp32]\n", ["line 4", "'head.*'"]),
    "index": ("skip_conv_layers: [0, 7]\n", ["line 2", "7", "0 to 6"]),
    "contradicting globs": (
        "precisions:\n  layers:\n    'features.*': [fp32]\n    '*.conv.0': [int8]\n",
        ["line 5", "features.0.conv.0", "add an entry"],
    ),
}


@pytest.mark.parametrize("text, parts", UNBINDABLE.values(), ids=UNBINDABLE.keys())
def test_spaces_that_do_not_fit_the_model_are_refused(tmp_path: Path, text: str, parts: list[str]) -> None:
    space = load_space(write(tmp_path, text))
    with pytest.raises(SpaceError) as caught:
        bind_space(space, GRAPH)
    for part in ["mine.yaml", *parts]:
        assert part in str(caught.value)


def test_missing_file_names_the_presets() -> None:
    with pytest.raises(SpaceError, match=r"nowhere\.yaml.*default"):
        load_space("nowhere.yaml")


def test_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xff\xfe\x00version")
    with pytest.raises(SpaceError, match="not a text file"):
        load_space(path)


def test_hash_ignores_comments_order_and_name(tmp_path: Path) -> None:
    one = load_space(
        write(tmp_path, "# one\nname: one\nskip: [a, b]\ngranularities: [layer_wise, channel_wise]\n")
    ).content_hash()
    two = load_space(write(tmp_path, "granularities: [channel_wise, layer_wise]\nskip: [b, a]\nname: two\n")).content_hash()
    three = load_space(write(tmp_path, "granularities: [channel_wise]\nskip: [b, a]\n")).content_hash()
    assert one == two != three


def test_most_specific_entry_wins(tmp_path: Path) -> None:
    text = (
        "precisions:\n  default: [int8]\n  types: {depthwise: [fp32], dense: [fp32, int8]}\n"
        "  layers: {'features.0.*': [fp32, int8], features.0.conv.1: [int8]}\nskip: [features.1.conv.0]\n"
    )
    allowed = {layer.name: layer.values for layer in bind_space(load_space(write(tmp_path, text)), GRAPH).layers}
    assert allowed == {
        "features.0.conv.0": ("fp32", "int8"),
        "features.0.conv.1": ("int8",),
        "features.0.conv.2": ("fp32", "int8"),
        "features.1.conv.0": ("fp32",),
        "features.1.conv.1": ("int8",),
        "features.1.conv.2": ("fp32",),
        "features.2.conv.0": ("int8",),
        "classifier": ("fp32", "int8"),
    }


def test_every_free_parameter_is_suggested_and_fixed_ones_are_not(tmp_path: Path) -> None:
    bound = bind_space(load_space(write(tmp_path, "skip: [classifier]\n")), GRAPH)
    trial = optuna.create_study().ask(bound.distributions())
    layers = {layer.name for layer in GRAPH.layers} - {"classifier"}
    assert set(trial.params) == layers | {"calibration", "percentile_tail"}
    config = bound.config(trial.params)
    assert config.precision["classifier"] == "fp32"
    assert set(config.precision) == layers | {"classifier"}


def test_settings_without_effect_do_not_distinguish_configurations() -> None:
    bound = bind_space(load_space("default"), GRAPH)
    fp32 = dict.fromkeys((layer.name for layer in GRAPH.layers), "fp32")
    int8 = dict.fromkeys(fp32, "int8")
    assert bound.config({**fp32, "calibration": "mse"}) == bound.config({**fp32, "granularity": "layer_wise"})
    one = bound.config({**int8, "calibration": "mse", "percentile_tail": 0.1})
    assert one == bound.config({**int8, "calibration": "mse", "percentile_tail": 0.2})
    clipped = bound.config({**int8, "calibration": "percentile", "percentile_tail": 0.01234})
    assert clipped.calibration.percentile == pytest.approx(99.988)
    assert clipped != bound.config({**int8, "calibration": "percentile", "percentile_tail": 0.02})


def test_all_layers_skipped_leaves_one_configuration(tmp_path: Path) -> None:
    text = "skip: ['*']\n"
    bound = bind_space(load_space(write(tmp_path, text)), GRAPH)
    assert bound.size == 1
    assert list(bound.all_values()) == [{}]
    assert set(bound.config({}).precision.values()) == {"fp32"}


def test_a_rule_opens_its_choices_to_the_search(tmp_path: Path) -> None:
    text = """
granularities: [channel_wise]
rules:
  - types: [dense]
    granularities: [channel_wise, layer_wise]
    calibration: {modes: [percentile], percentile: [99, 99.9]}
  - position: last
    precisions: [fp32]
"""
    space = bind_space(load_space(write(tmp_path, text)), GRAPH)
    free = {one.name for one in space.parameters}
    assert {"rule_1_granularity", "rule_1_percentile_tail"} <= free
    assert "granularity" not in free
    last = GRAPH.layers[-1].name
    assert last not in free
    lowered = {layer.name: "int8" for layer in GRAPH.layers if layer.name != last}
    config = space.config({**lowered, "rule_1_granularity": "layer_wise", "rule_1_percentile_tail": 0.5})
    settings = config.resolve(GRAPH.layer_types)
    for name, kind in GRAPH.layer_types.items():
        if settings[name].precision == "fp32":
            continue
        assert settings[name].weights.granularity == ("layer_wise" if kind == "dense" else "channel_wise")
        assert settings[name].calibration.mode == ("percentile" if kind == "dense" else "max")


@pytest.mark.parametrize("short", ["fp16", "tf32"])
def test_layers_of_unscaled_floats_need_no_calibration(tmp_path: Path, short: str) -> None:
    space = bind_space(load_space(write(tmp_path, f"precisions:\n  default: [fp32, {short}]\n")), GRAPH)
    assert {one.name for one in space.parameters} == {layer.name for layer in GRAPH.layers}
    wider = bind_space(load_space(write(tmp_path, f"precisions:\n  default: [int8, {short}, fp32]\n")), GRAPH)
    assert wider.layers[0].values == ("fp32", short, "int8")
    floats = dict.fromkeys((layer.name for layer in GRAPH.layers), short)
    assert wider.config({**floats, "calibration": "mse"}) == wider.config({**floats, "calibration": "max"})
    mixed = {**floats, GRAPH.layers[0].name: "int8"}
    assert wider.config({**mixed, "calibration": "mse"}) != wider.config({**mixed, "calibration": "max"})


def test_rules_without_effect_do_not_distinguish_configurations(tmp_path: Path) -> None:
    text = "rules:\n  - types: [dense]\n    granularities: [channel_wise, layer_wise]\n"
    space = bind_space(load_space(write(tmp_path, text)), GRAPH)
    floats = {layer.name: "int8" if GRAPH.layer_types[layer.name] != "dense" else "fp32" for layer in GRAPH.layers}
    values = [{**floats, "rule_1_granularity": name} for name in ("channel_wise", "layer_wise")]
    assert len({space.config(one).content_hash() for one in values}) == 1


def test_settings_that_no_layer_can_take_fall_back_to_what_it_has() -> None:
    space = bind_space(load_space("full"), GRAPH)
    wanted = {"granularity": "group_wise", "weight_symmetry": "asymmetric", "rounding": "second_order", "weight_scale": "mse"}
    of = {
        precision: space.config({**wanted, **{layer.name: precision for layer in GRAPH.layers}})
        for precision in ("int16", "int8", "fp8", "w4a8")
    }
    assert of["w4a8"].weights == WeightSettings("group_wise", "max", "asymmetric", "second_order")
    assert of["int8"].weights == WeightSettings("channel_wise", "max", "symmetric", "second_order")
    assert of["int16"].weights == of["fp8"].weights == WeightSettings()


def test_methods_that_find_nothing_to_do_are_left_out() -> None:
    every = bind_space(load_space("full"), GRAPH)
    found = bind_space(load_space("full"), GRAPH, lambda: ("migration", "bias_absorption"))
    names = {one.name for one in every.parameters}
    assert {one.name for one in found.parameters} == names - {"migration", "bias_absorption"}
    values = {layer.name: "int8" for layer in GRAPH.layers}
    configs = [found.config({**values, "migration": strength}) for strength in (0.0, 0.5)]
    # The value was suggested to a study that was begun before.
    assert {config.migration for config in configs} == {0.0, 0.5}
    # Where a space opens no method, nobody looks for what they would do.
    bind_space(load_space("default"), GRAPH, lambda: pytest.fail("asked"))


def test_a_start_may_name_a_method_that_finds_nothing_to_do(tmp_path: Path) -> None:
    text = "equalizations: [false, true]\nstart:\n  equalization: true\n"
    space = bind_space(load_space(write(tmp_path, text)), GRAPH, lambda: ["equalization"])
    assert space.start_values()["equalization"] is False


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_stands_for_a_configuration_of_its_space(name: str) -> None:
    space = bind_space(load_space(name), GRAPH)
    values = space.start_values()
    for one in space.parameters:
        if isinstance(one, Choices):
            assert values[one.name] in one.values
    config = space.config(values)
    expected = {
        "precision_preserving": ("percentile", 99.9, "channel_wise"),
        "performance_optimized": ("max", 99.99, "layer_wise"),
        "rule_driven": ("global_scale", 99.99, "channel_wise"),
    }
    if name in expected:
        assert (config.calibration.mode, config.calibration.percentile, config.granularity) == expected[name]
    if name == "rule_driven":
        assert config.calibration.global_scale == 6.0
        assert {config.precision[layer] for layer in GRAPH.dense} == {"fp32"}


def test_a_start_beyond_its_space_is_refused(tmp_path: Path) -> None:
    space = bind_space(load_space(write(tmp_path, "start:\n  granularity: layer_wise\n")), GRAPH)
    with pytest.raises(SpaceError, match="line 3.*granularity is 'layer_wise', which the space does not allow"):
        space.start_values()


def test_spaces_from_before_rules_keep_their_hash(tmp_path: Path) -> None:
    # Of a study that was begun before there were rules and methods.
    assert load_space("default").content_hash() == "1ba244a7745b40243aa7a03e929d5d9f865e920cf67aaddc3ecf55c965438e59"
