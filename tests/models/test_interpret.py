"""The interpreter against the same networks written with torch's functional interface."""

import json
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import images, network

from qsearch.calibrate.observe import observe
from qsearch.errors import UnsupportedModelError
from qsearch.models.graph import ACTIVATIONS, Conv, ForeignOp, Graph, Model, Node, Parameters, Pool
from qsearch.models.interpret import interpret
from qsearch.models.interpret_memory import images_run

IMAGE = (1, 4, 9, 10)


def model_of(*nodes: Node, shape: tuple[int, ...] = IMAGE, parameters: Parameters | None = None) -> Model:
    graph = Graph((Node("input", "input", (), shape), *nodes), nodes[-1].name)
    return Model("test", graph, parameters or Parameters())


def random_images(count: int = 3) -> torch.Tensor:
    return torch.randn((count, *IMAGE[1:]), generator=torch.Generator().manual_seed(0))


def layers(**shapes: tuple[int, ...]) -> Parameters:
    rng = np.random.default_rng(0)
    weight = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return Parameters(weight, {name: rng.normal(size=shape[0]).astype(np.float32) for name, shape in shapes.items()})


def foreign(name: str, inputs: tuple[str, ...], shape: tuple[int, ...], target: str, *args: object, **kwargs: object) -> Node:
    return Node(name, "foreign", inputs, shape, foreign=ForeignOp(target, json.dumps({"args": args, "kwargs": kwargs})))


@settings(max_examples=25, deadline=None)
@given(
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    stride=st.tuples(*[st.integers(1, 2)] * 2),
    dilation=st.tuples(*[st.integers(1, 2)] * 2),
    groups=st.sampled_from([1, 2, 4]),
    clip=st.sampled_from([None, (0.0, 6.0), (0.0, float("inf"))]),
    residual=st.booleans(),
)
def test_convolutions(padding, stride, dilation, groups, clip, residual) -> None:
    parameters = layers(conv=(8, 4 // groups, 3, 3))
    x = random_images()
    top, left, bottom, right = padding
    weight, bias = torch.from_numpy(parameters.weight["conv"]), torch.from_numpy(parameters.bias["conv"])
    expected = F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride, 0, dilation, groups)
    conv = Conv((3, 3), stride, padding, dilation, groups)
    inputs: tuple[str, ...] = ("input",)
    nodes = []
    if residual:
        values = torch.arange(expected[0].numel(), dtype=torch.float32).reshape(expected[:1].shape)
        parameters.constants["shortcut"] = values.numpy()
        nodes = [foreign("shortcut", (), tuple(values.shape), "aten.relu.default", {"parameter": "shortcut"})]
        inputs, expected = ("input", "shortcut"), expected + values
    nodes.append(Node("conv", "conv2d", inputs, tuple(expected.shape), conv, clip=clip, residual=residual))
    expected = expected if clip is None else expected.clamp(*clip)
    torch.testing.assert_close(interpret(model_of(*nodes, parameters=parameters), x), expected, rtol=1e-4, atol=1e-4)


def test_an_inverted_residual_network() -> None:
    parameters = layers(expand=(8, 4, 1, 1), depthwise=(8, 1, 3, 3), project=(4, 8, 1, 1), fc=(5, 24 * 5, 1, 1))
    model = model_of(
        Node("expand", "conv2d", ("input",), (1, 8, 9, 10), Conv(), clip=(0.0, 6.0)),
        Node("depthwise", "conv2d", ("expand",), (1, 8, 9, 10), Conv((3, 3), padding=(1,) * 4, groups=8), clip=(0.0, 6.0)),
        Node("project", "conv2d", ("depthwise", "input"), IMAGE, Conv(), residual=True),
        Node("add", "add", ("project", "input"), IMAGE, clip=(-1.0, 1.0)),
        Node("concat", "concat", ("add", "depthwise"), (1, 12, 9, 10)),
        Node("pool", "avg_pool2d", ("concat",), (1, 12, 2, 5), pool=Pool((4, 2), (4, 2))),
        Node("flatten", "flatten", ("pool",), (1, 120)),
        Node("fc", "linear", ("flatten",), (1, 5), Conv(), clip=(0.0, float("inf"))),
        parameters=parameters,
    )
    x = random_images()
    weight = {name: torch.from_numpy(array) for name, array in parameters.weight.items()}
    bias = {name: torch.from_numpy(array) for name, array in parameters.bias.items()}
    depthwise = F.relu6(F.conv2d(x, weight["expand"], bias["expand"]))
    depthwise = F.relu6(F.conv2d(depthwise, weight["depthwise"], bias["depthwise"], padding=1, groups=8))
    project = F.conv2d(depthwise, weight["project"], bias["project"]) + x
    joined = torch.cat([(project + x).clamp(-1, 1), depthwise], 1)
    features = F.avg_pool2d(joined, (4, 2)).flatten(1)
    expected = F.relu(F.linear(features, weight["fc"].flatten(1), bias["fc"]))
    torch.testing.assert_close(interpret(model, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 1, 1, 1), (0, 0, 1, 1), (1, 0, 0, 1)])
def test_pools(padding: tuple[int, int, int, int], include: bool) -> None:
    top, left, bottom, right = padding
    x = random_images() - 3  # negative, so that a padded zero would win a maximum
    pool = Pool((3, 3), (2, 2), padding, include)
    around = (left, right, top, bottom)
    expected = F.max_pool2d(F.pad(x, around, value=-torch.inf), 3, 2)
    torch.testing.assert_close(interpret(model_of(Node("p", "max_pool2d", ("input",), IMAGE, pool=pool)), x), expected)
    padded, inside = F.pad(x, around), F.pad(torch.ones_like(x), around)
    divisor = 1.0 if include else F.avg_pool2d(inside, 3, 2)
    expected = F.avg_pool2d(padded, 3, 2) / divisor
    torch.testing.assert_close(interpret(model_of(Node("p", "avg_pool2d", ("input",), IMAGE, pool=pool)), x), expected)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    x = 4 * random_images()
    clip = (-1.0, 2.0) if name == "clip" else None
    result = interpret(model_of(Node("a", "activation", ("input",), IMAGE, activation=name, clip=clip)), x)
    expected = x.clamp(-1, 2) if name == "clip" else getattr(F, name)(x)
    torch.testing.assert_close(result, expected)


def test_multiplication_broadcasts_a_gate() -> None:
    x = random_images()
    model = model_of(
        Node("mean", "avg_pool2d", ("input",), (1, 4, 1, 1), pool=Pool((9, 10), (1, 1))),
        Node("gate", "activation", ("mean",), (1, 4, 1, 1), activation="hardsigmoid"),
        Node("mul", "mul", ("input", "gate"), IMAGE),
    )
    torch.testing.assert_close(interpret(model, x), x * F.hardsigmoid(x.mean((2, 3), keepdim=True)))


def test_linear_acts_on_the_last_axis() -> None:
    parameters = layers(fc=(7, 10, 1, 1))
    x = random_images()
    weight, bias = torch.from_numpy(parameters.weight["fc"]).flatten(1), torch.from_numpy(parameters.bias["fc"])
    model = model_of(Node("fc", "linear", ("input",), (1, 4, 9, 7), Conv()), parameters=parameters)
    torch.testing.assert_close(interpret(model, x), F.linear(x, weight, bias))


def test_foreign_operators_with_parameters_tuples_and_dtypes() -> None:
    scale = np.linspace(1, 2, 10, dtype=np.float32)
    model = model_of(
        foreign("norm", ("input",), IMAGE, "aten.layer_norm.default", {"tensor": 0}, [10], {"parameter": "s"}, None, 1e-5),
        foreign("top", ("norm",), (1, 4, 9, 2), "aten.topk.default", {"tensor": 0}, 2),
        foreign("cast", ("top",), (1, 4, 9, 2), "aten.sum.dim_IntList", {"tensor": 0}, [3], True, dtype={"dtype": "float64"}),
        foreign("both", ("top", "cast"), (1, 4, 9, 3), "aten.cat.default", [{"tensor": 0}, {"tensor": 1}], -1),
        parameters=Parameters(constants={"s": scale}),
    )
    x = random_images()
    top = F.layer_norm(x, [10], torch.from_numpy(scale)).topk(2).values
    torch.testing.assert_close(interpret(model, x), torch.cat([top, top.sum(3, True, dtype=torch.float64)], -1))


def test_foreign_operators_may_hold_the_batch_they_were_exported_with() -> None:
    """A view that names its batch, and one that puts windows and batch into one axis."""
    windows = (3, 4, 3, 10)
    model = model_of(
        foreign("split", ("input",), (1, 4, 3, 3, 10), "aten.view.default", {"tensor": 0}, [1, 4, 3, 3, 10]),
        foreign("front", ("split",), (3, 1, 4, 3, 10), "aten.permute.default", {"tensor": 0}, [2, 0, 1, 3, 4]),
        foreign("windows", ("front",), windows, "aten.reshape.default", {"tensor": 0}, list(windows)),
        Node("act", "activation", ("windows",), windows, activation="relu"),
        foreign("back", ("act",), (1, 3, 4, 3, 10), "aten.view.default", {"tensor": 0}, [1, 3, 4, 3, 10]),
    )
    x = random_images()
    expected = F.relu(x).reshape(3, 4, 3, 3, 10).permute(0, 2, 1, 3, 4)
    torch.testing.assert_close(interpret(model, x), expected)


@pytest.mark.parametrize("name", ["vit", "swin", "foreign", "residual"])
def test_any_number_of_images_where_operations_hold_a_batch(name: str) -> None:
    """The last batch is filled up with images given; nothing of these is in the output, and statistics count what was run."""
    alone, three = network(name)[0], network(name, 3)[0]
    given = torch.from_numpy(images(7))
    torch.testing.assert_close(interpret(three, given), interpret(alone, given))
    run = images_run(three.graph, 7)
    assert run == (7 if name == "residual" else 9)
    one, other = (observe(model, images(8), 5) for model in (alone, three))
    # Moving several images may take operations of its own.
    assert one.tensors.keys() <= other.tensors.keys()
    for value, found in one.tensors.items():
        assert found.minimum == pytest.approx(other.tensors[value].minimum, abs=1e-5)
        assert found.maximum == pytest.approx(other.tensors[value].maximum, abs=1e-5)


def test_every_value_is_shown_in_order_and_freed_after_its_last_use() -> None:
    nodes = [Node(f"n{i}", "activation", (f"n{i - 1}" if i else "input",), IMAGE, activation="tanh") for i in range(5)]
    model = model_of(*nodes)
    seen: list[str] = []
    alive: list[torch.Tensor] = []
    references: list[weakref.ref[torch.Tensor]] = []

    def watch(node: Node, value: torch.Tensor) -> None:
        seen.append(node.name)
        references.append(weakref.ref(value))
        alive.append(torch.tensor(sum(reference() is not None for reference in references)))

    interpret(model, random_images(), watch)
    assert seen == [node.name for node in model.graph.nodes]
    assert max(int(count) for count in alive) <= 3


def test_unknown_operations_are_named() -> None:
    x = random_images()
    with pytest.raises(UnsupportedModelError, match=r"'odd'.*'conv9d'"):
        interpret(model_of(Node("odd", "conv9d", ("input",), IMAGE)), x)
    with pytest.raises(UnsupportedModelError, match="'swish'"):
        interpret(model_of(Node("odd", "activation", ("input",), IMAGE, activation="swish")), x)
    with pytest.raises(UnsupportedModelError, match=r"aten\.nothing\.default"):
        interpret(model_of(foreign("odd", ("input",), IMAGE, "aten.nothing.default", {"tensor": 0})), x)
