"""The outputs that the sensitivity bench keeps: found again by all that they depend on."""

from types import SimpleNamespace

import numpy as np
from sensitivity import Modules

from qsearch.config import QuantConfig


class Evaluator:
    """Counts what it compiles; its module answers with the sum of an image."""

    dataset = SimpleNamespace(labels=lambda part: np.zeros(6, np.int64))

    def __init__(self, data, kernels):
        self.identity, self.kernels, self.compiled = {"model": "m", "data": data, "target": "t"}, kernels, []

    def images(self, part):
        return np.arange(6 * 4, dtype=np.float32).reshape(6, 1, 2, 2)

    def kernels_sha256(self, config):
        return self.kernels

    def compile(self, config):
        self.compiled.append(config)

        def main(image):
            total = image.numpy().sum()
            return SimpleNamespace(numpy=lambda: np.array([[total, 1.0]], np.float32))

        return SimpleNamespace(open=lambda: {"main": main})


def test_outputs_are_kept_for_the_same_data_kernels_configuration_and_images_alone(tmp_path):
    first = Evaluator("d", "k")
    int8, int16 = ({"one": QuantConfig(default_precision=name)} for name in ("int8", "int16"))
    truth = Modules(first, tmp_path).truth(int8)
    assert truth.divergence.shape == (1, 6)
    again = Evaluator("d", "k")
    modules = Modules(again, tmp_path)
    np.testing.assert_array_equal(modules.truth(int8).divergence, truth.divergence)
    assert not again.compiled
    assert modules.truth(int8, 3).divergence.shape == (1, 3)
    modules.truth(int16)
    assert len(again.compiled) == 2
    for other in (Evaluator("other", "k"), Evaluator("d", "other")):
        Modules(other, tmp_path).truth(int8)
        # Float as well.
        assert len(other.compiled) == 2
