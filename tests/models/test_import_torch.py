"""Import: names, folding, fusing, and the refusals."""

import pytest
import torch
from networks import NETWORKS, SHAPE, network
from torch import nn

from qsearch.errors import UnsupportedModelError
from qsearch.models.import_torch import import_model
from qsearch.models.interpret import interpret


@pytest.mark.parametrize("name", NETWORKS)
def test_graph_computes_what_the_module_computes(name):
    model, module = network(name)
    x = torch.randn(4, *SHAPE[1:], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = torch.cat([module(image[None]) for image in x])
    torch.testing.assert_close(interpret(model, x), expected, rtol=1e-4, atol=1e-5)


def test_layers_keep_the_users_names_and_batch_norm_is_folded():
    model, _ = network("residual")
    assert [layer.name for layer in model.graph.layers] == [
        "stem.0",
        "expand.0",
        "depth.0",
        "project.0",
        "grouped",
        "head",
    ]
    assert set(model.parameters.norm) == {"stem.0", "expand.0", "depth.0", "project.0"}
    assert not model.graph.foreign


def test_residual_and_clip_are_fused_into_the_layer():
    graph = network("residual")[0].graph
    assert graph.by_name["project.0"].residual and graph.by_name["project.0"].inputs == ("depth.0", "stem.0")
    assert graph.by_name["stem.0"].clip == (0.0, 6.0)
    assert graph.by_name["grouped"].conv.padding == (1, 0, 0, 1)
    assert "add" not in {node.op for node in graph.nodes}


def test_a_value_read_twice_is_not_fused_away():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

        def forward(self, x):
            x = self.conv(x)
            return self.head((torch.relu(x) + x).mean((2, 3)))

    graph = import_model("twice", Twice().eval(), SHAPE).graph
    assert graph.by_name["conv"].clip is None and not graph.by_name["conv"].residual


def test_unknown_operators_are_foreign_and_named():
    graph = network("foreign")[0].graph
    kinds = {node.foreign.target for node in graph.nodes if node.foreign}
    assert kinds == {"aten.leaky_relu.default"}


def test_heads_and_windows_are_strides_not_copies():
    """Attention reads queries, keys and values where the linear layer wrote them, and joins heads by writing side by side."""
    graph = network("vit")[0].graph
    kinds = [node.op for node in graph.nodes]
    assert not graph.foreign and kinds.count("matmul") == 4
    assert [node.name for node in graph.nodes if node.op == "gather"] == ["patches.gather", "norm.gather"]
    assert [node.name for node in graph.nodes if node.residual] == [
        f"blocks.{i}.{layer}" for i in range(2) for layer in ("attention.out_proj", "mlp.2")
    ]


def test_queries_keys_and_values_may_be_chunks_of_one_layers_value():
    class Chunked(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.qkv, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 24), nn.Linear(8, 4)

        def forward(self, x):
            q, k, v = self.qkv(self.patches(x).flatten(2).transpose(1, 2)).chunk(3, -1)
            return self.head(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])

    module = Chunked().eval()
    model = import_model("chunked", module, SHAPE)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(interpret(model, x), module(x).detach(), rtol=1e-4, atol=1e-5)
    kinds = [node.op for node in model.graph.nodes]
    assert not model.graph.foreign and kinds.count("matmul") == 2 and kinds.count("gather") == 1


def test_windows_cost_one_copy_in_and_one_for_the_residual():
    """Partition, shift, padding, their inverses and patch merging compose; biases and scales fold."""
    graph = network("swin")[0].graph
    kinds = [node.op for node in graph.nodes]
    assert not graph.foreign and kinds.count("shift") == 0 and kinds.count("scale") == 1
    assert kinds.count("gather") <= 8


def test_channels_last_permutes_vanish_and_layer_scale_folds():
    graph = network("convnext")[0].graph
    assert {node.op for node in graph.nodes} == {
        *("input", "conv2d", "view", "layer_norm", "linear", "activation", "avg_pool2d", "flatten"),
    }


def test_a_shared_layer_appears_once_per_use():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 3, 1), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.conv(torch.relu(self.conv(x))).mean((2, 3)))

    assert [node.name for node in import_model("shared", Shared().eval(), SHAPE).graph.layers] == ["conv", "conv#2", "head"]


class _TwoInputs(nn.Module):
    def forward(self, x, y):
        return x + y


class _Branching(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


class _Image(nn.Module):
    def forward(self, x):
        return torch.relu(x)


class _Several(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)), x.amax((2, 3))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (_TwoInputs(), "cannot trace"),
        (_Branching(), "cannot trace"),
        (_Image(), "a classifier returns"),
        (_Several(), "returns 2 tensors"),
    ],
)
def test_models_out_of_reach_are_refused_in_one_sentence(module, words):
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        import_model("refused", module, SHAPE)
    assert "\n" not in str(caught.value)
