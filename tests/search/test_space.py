"""Search space files: presets, every kind of mistake, the semantic hash."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from analytic import make_graph

from qsearch.errors import SpaceError
from qsearch.search.bound_space import bind_space
from qsearch.search.space import load_space, preset_names

GRAPH = make_graph()


def write(folder: Path, text: str) -> Path:
    """Write a space file; the version is given unless the text has one."""
    path = folder / "mine.yaml"
    path.write_text(text if "version" in text else f"version: 1\n{text}", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["default", "performance_optimized", "precision_preserving"])
def test_presets_load_bind_and_say_whom_they_are_for(name: str) -> None:
    space = load_space(name)
    assert space.name == name
    assert bind_space(space, GRAPH).parameters
    assert space._source is not None
    assert space._source.path.read_text(encoding="utf-8").startswith("# For whoever")


def test_preset_names() -> None:
    assert {"default", "performance_optimized", "precision_preserving"} <= set(preset_names())


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
