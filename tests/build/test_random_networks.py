"""Any valid configuration of any network builds and equals the reference: random ones, kernel by kernel and as a whole."""

import numpy as np
import pytest
from random_networks import RandomNetwork, differences
from torch import nn

from qsearch.build.cache import KernelCache
from qsearch.build.link import Linker
from qsearch.build.target import open_target

FEW, MANY = range(8), range(8, 50)


@pytest.fixture(scope="module")
def linker(tmp_path_factory):
    return Linker(KernelCache(tmp_path_factory.mktemp("kernels"), open_target("host")))


@pytest.mark.parametrize("seed", [*FEW, *(pytest.param(seed, marks=pytest.mark.slow) for seed in MANY)])
def test_a_random_network_equals_the_reference(linker, seed):
    assert differences(linker, seed) == []


def test_networks_have_three_to_twenty_layers_and_differ():
    modules = [RandomNetwork(np.random.default_rng([seed, 0])) for seed in range(60)]
    counts = [sum(isinstance(one, nn.Conv2d | nn.Linear) for one in module.modules()) for module in modules]
    assert min(counts) >= 3 and max(counts) <= 20 and len(set(counts)) > 10
    assert {kind for module in modules for kind in module.kinds} == {"conv", "depthwise", "residual", "concat", "gate", "pool"}
