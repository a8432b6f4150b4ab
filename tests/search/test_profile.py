"""Task profiles: which layers stay precise, and what a model is for."""

from dataclasses import replace

import pytest
from analytic import make_graph

from qsearch.config import LayerRule, LayerType, QuantConfig
from qsearch.errors import UnsupportedModelError
from qsearch.models.detection import DetectionHead
from qsearch.models.graph import Conv, Graph, Node
from qsearch.models.zoo import LoadedModel, load_model
from qsearch.search.bound_space import bind_space
from qsearch.search.profile import Profile, check_outputs, for_task, last_layers, task_profile
from qsearch.search.space import PrecisionChoices, SearchSpace

SIDE, SHAPE = (16, 16), (1, 8, 2, 2)


def detector() -> Graph:
    """Two branches behind a backbone, joined for the output."""
    conv = Conv((1, 1))
    nodes = (
        Node("input", "input", (), (1, 3, *SIDE)),
        Node("backbone", "conv2d", ("input",), SHAPE, conv=conv),
        Node("box.0", "conv2d", ("backbone",), SHAPE, conv=conv),
        Node("box.1", "conv2d", ("box.0",), (1, 4, 2, 2), conv=conv),
        Node("class.0", "conv2d", ("backbone",), (1, 3, 2, 2), conv=conv),
        Node("sum", "add", ("class.0", "class.0"), (1, 3, 2, 2)),
        Node("cat", "concat", ("box.1", "sum"), (1, 7, 2, 2)),
        Node("out", "view", ("cat",), (1, 4, 7)),
    )
    return Graph(nodes, "out")


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model("demo")


def test_the_last_layers_are_those_that_no_layer_follows() -> None:
    assert last_layers(detector()) == {"box.1", "class.0"}
    assert last_layers(make_graph()) == {"classifier"}


def test_a_detector_keeps_its_last_layers_and_those_its_record_names() -> None:
    assert task_profile(detector(), DetectionHead((8,))) == Profile("detection", ("box.1", "class.0"))
    assert task_profile(detector(), DetectionHead((8,), heads=("box.*",))).precise == ("box.0", "box.1", "class.0")
    with pytest.raises(UnsupportedModelError, match=r"heads names 'bbox.*', which matches no layer; the last ones are .*class.0"):
        task_profile(detector(), DetectionHead((8,), heads=("bbox.*",)))


def test_a_classifier_is_searched_as_its_space_says() -> None:
    profile, space = task_profile(make_graph(), None), SearchSpace(version=1)
    assert profile == Profile()
    assert profile.space(space) is space
    config = QuantConfig()
    assert profile.config(config) is config
    assert "top-1" in profile.sentence


def test_precise_layers_are_fp32_or_int16_in_a_space_unless_it_names_them() -> None:
    profile = Profile("detection", ("box.1", "class.0"))
    plain = SearchSpace(version=1, precisions=PrecisionChoices(default=("int8", "w4a8")))
    allowed = {one.name: one.values for one in bind_space(profile.space(plain), detector()).layers}
    low = ("int8", "w4a8")
    assert allowed == {"backbone": low, "box.0": low, "box.1": ("fp32", "int16"), "class.0": ("fp32", "int16")}
    named = replace_layers(plain, {"box.*": ("int8",)})
    allowed = {one.name: one.values for one in bind_space(profile.space(named), detector()).layers}
    assert allowed == {"backbone": low, "box.0": ("int8",), "box.1": ("int8",), "class.0": ("fp32", "int16")}
    assert profile.space(plain).content_hash() != plain.content_hash()


def replace_layers(space: SearchSpace, layers: dict) -> SearchSpace:
    return space.model_copy(update={"precisions": space.precisions.model_copy(update={"layers": layers})})


def precisions(config: QuantConfig, layers: dict[str, LayerType]) -> dict[str, str]:
    return {name: one.precision for name, one in config.resolve(layers).items()}


def test_precise_layers_are_int16_in_a_configuration_unless_it_names_them() -> None:
    profile = Profile("detection", ("box.1", "class.0"))
    layers: dict[str, LayerType] = dict.fromkeys(("backbone", "box.0", "box.1", "class.0"), "conv")
    config = profile.config(QuantConfig(default_precision="w4a8", precision={"class.0": "int8"}))
    found = {"backbone": "w4a8", "box.0": "w4a8", "box.1": "int16", "class.0": "int8"}
    assert precisions(config, layers) == found
    skipping = profile.config(QuantConfig(skip=("box.*",)))
    assert precisions(skipping, layers) == {"backbone": "int8", "box.0": "fp32", "box.1": "fp32", "class.0": "int16"}
    assert profile.config(QuantConfig(default_precision="fp32")).precision == {}
    ruled = profile.config(QuantConfig(rules=(LayerRule(layers=("class.*",), precision="int8"),)))
    assert precisions(ruled, layers)["class.0"] == "int8"
    assert "box.1, class.0 stay at int16 or fp32" in profile.sentence


def test_the_task_is_the_model_s_unless_the_user_says_otherwise(demo: LoadedModel) -> None:
    finding = replace(demo, detection=DetectionHead((8,)))
    assert for_task(demo, None) is demo
    assert for_task(finding, None) is finding
    assert for_task(finding, "detection") is finding
    assert for_task(finding, "classification").detection is None
    with pytest.raises(UnsupportedModelError, match=r"'demo' does not say how its output is read as boxes: put DETECTION"):
        for_task(demo, "detection")


def test_outputs_must_be_those_of_the_task(demo: LoadedModel) -> None:
    assert check_outputs(make_graph(), demo) == 10
    assert check_outputs(detector(), replace(demo, detection=DetectionHead((8,)))) == 3
    with pytest.raises(
        UnsupportedModelError, match=r"returns shape \(1, 4, 7\); a classifier returns \(batch, classes\). If it is"
    ):
        check_outputs(detector(), demo)
    with pytest.raises(UnsupportedModelError, match=r"a detector returns \(batch, 16, 4 \+ classes\)"):
        check_outputs(detector(), replace(demo, detection=DetectionHead((4,))))
