"""Random networks of 3 to 20 layers, random configurations of them, and whether their modules equal the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from qsearch.build.foreign import run_foreign
from qsearch.build.link import Linker
from qsearch.calibrate.observe import observe
from qsearch.calibrate.ranges import activation_ranges
from qsearch.config import QuantConfig
from qsearch.models.graph import Model
from qsearch.models.import_torch import import_model
from qsearch.quantize.lower import lower
from qsearch.quantize.program import Op, Program
from qsearch.quantize.reference import run_op, run_program
from qsearch.quantize.weight_store import WeightStore

__all__ = ["RandomNetwork", "differences", "random_config", "random_model"]

PRECISIONS = ("fp32", "int16", "int8", "w4a8")
ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.Identity, nn.Sigmoid)
INTEGERS = ("int8", "int16", "w4a8")


class RandomNetwork(nn.Module):
    """Convolutions of every kind, residuals, concatenations, gates and pools in random order, then a linear layer or two.

    Args:
        rng: Draws all of it.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        self.channels = int(rng.choice([1, 3]))
        self.side = (int(rng.integers(7, 17)), int(rng.integers(7, 17)))
        self.steps = nn.ModuleList()
        self.kinds: list[str] = []
        channels, layers, most = self.channels, 0, int(rng.integers(2, 19))
        smallest = min(self.side)
        while layers < most:
            kind = str(rng.choice(["conv", "conv", "depthwise", "residual", "concat", "gate", "pool"]))
            step, out, shrinks = _step(rng, kind, channels, smallest)
            if step is None:
                continue
            self.steps.append(step)
            self.kinds.append(kind)
            layers += sum(isinstance(one, nn.Conv2d | nn.Linear) for one in step.modules())
            channels, smallest = out, -(-smallest // 2) if shrinks else smallest
        self.head = nn.Linear(channels, int(rng.integers(2, 12)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for kind, step in zip(self.kinds, self.steps, strict=True):
            if kind == "residual":
                x = torch.relu(x + step(x))
            elif kind == "concat":
                x = torch.cat([x, step(x)], 1)
            elif kind == "gate":
                x = x * step(x.mean((2, 3), keepdim=True))
            else:
                x = step(x)
        return self.head(x.mean((2, 3)))


def _step(rng: np.random.Generator, kind: str, channels: int, smallest: int) -> tuple[nn.Module | None, int, bool]:
    """A step, the channels after it, and whether it halves the image; None where it does not fit."""
    act = ACTIVATIONS[int(rng.integers(len(ACTIVATIONS)))]()
    size = int(rng.choice([1, 3, 3, 5]))
    stride = 2 if smallest >= 6 and rng.random() < 0.3 else 1
    if kind == "conv":
        out = int(rng.integers(1, 41))
        groups = 2 if channels % 2 == 0 and out % 2 == 0 and rng.random() < 0.2 else 1
        conv = nn.Conv2d(channels, out, size, stride, size // 2, groups=groups, bias=bool(rng.random() < 0.5))
        return nn.Sequential(conv, *([nn.BatchNorm2d(out)] if rng.random() < 0.6 else []), act), out, stride == 2
    if kind == "depthwise":
        conv = nn.Conv2d(channels, channels, max(size, 3), stride, max(size, 3) // 2, groups=channels)
        return (None if channels < 2 else nn.Sequential(conv, act)), channels, stride == 2
    if kind == "residual":
        return nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1), act, nn.Conv2d(channels, channels, 1)), channels, False
    if kind == "concat":
        out = int(rng.integers(1, 17))
        return (
            (None if channels > 64 else nn.Sequential(nn.Conv2d(channels, out, size, 1, size // 2), act)),
            channels + out,
            False,
        )
    if kind == "gate":
        inner = max(channels // 4, 1)
        return (
            nn.Sequential(nn.Conv2d(channels, inner, 1), nn.ReLU(), nn.Conv2d(inner, channels, 1), nn.Sigmoid()),
            channels,
            False,
        )
    pool = nn.MaxPool2d(3, 2, 1) if rng.random() < 0.5 else nn.AvgPool2d(2)
    return (None if smallest < 6 else pool), channels, True


def random_model(seed: int) -> tuple[Model, np.ndarray]:
    """An imported random network with settled batch norm, and images for it, float32 (8, C, H, W)."""
    rng = np.random.default_rng([seed, 0])
    torch.manual_seed(seed)
    module = RandomNetwork(rng)
    shape = (1, module.channels, *module.side)
    module.train()
    with torch.no_grad():
        module(torch.randn(16, *shape[1:]))
    module.eval()
    images = rng.standard_normal((8, *shape[1:])).astype(np.float32)
    return import_model(f"random{seed}", module, shape), images


def random_config(model: Model, seed: int) -> QuantConfig:
    """A random precision for every layer, and random settings."""
    rng = np.random.default_rng([seed, 1])
    some = [str(one) for one in rng.choice(PRECISIONS, int(rng.integers(1, 4)), replace=False)]
    settings: dict[str, Any] = {
        "granularity": str(rng.choice(["channel_wise", "layer_wise", "group_wise"])),
        "weight_scale": str(rng.choice(["max", "power_of_two", "mse"])),
        "activations": str(rng.choice(["asymmetric", "symmetric"])),
        "weight_symmetry": str(rng.choice(["symmetric", "asymmetric"])),
        "calibration": {"mode": str(rng.choice(["max", "percentile", "kl_divergence", "mse"]))},
    }
    return QuantConfig.model_validate(settings | {"precision": {node.name: str(rng.choice(some)) for node in model.graph.layers}})


def random_program(seed: int) -> tuple[Program, np.ndarray]:
    """A random network under a random configuration, and images."""
    model, images = random_model(seed)
    config = random_config(model, seed)
    record = observe(model, images, len(images))
    ranges = activation_ranges(record, model, config.calibration, (float(images.min()), float(images.max())))
    return lower(model, config, ranges, WeightStore()), images


def differences(linker: Linker, seed: int) -> list[str]:
    """What a random network's module does not compute as the reference does; empty where it all agrees.

    Every kernel whose arithmetic is integer is compared bit for bit, on the reference's values; the whole module as well where
    nothing in it computes in float, else within what float sums in another order may tip.
    """
    program, images = random_program(seed)
    module = linker.build(program)
    image = images[:1]
    expected = run_program(program, image, lambda op, inputs: run_foreign(op.key, op.constants, inputs))
    found = module.open()["main"](_tensor(image)).numpy()
    wrong = [f"seed {seed}: {name}" for name in _wrong_kernels(linker, program, expected)]
    reference = expected[program.output.name]
    exact = all(_is_exact(op) for op in program.ops)
    largest = float(np.abs(reference).max()) or 1.0
    if exact and not np.array_equal(found, reference):
        wrong.append(f"seed {seed}: the whole module, bit for bit")
    if not np.allclose(found, reference, rtol=0, atol=0.05 * largest + 1e-4):
        wrong.append(f"seed {seed}: the whole module, by {np.abs(found - reference).max() / largest:.3f} of the largest output")
    return wrong


def _tensor(array: np.ndarray) -> Any:
    import tvm

    return tvm.runtime.tensor(np.ascontiguousarray(array))


def _is_exact(op: Op) -> bool:
    """Whether an operation's arithmetic is integer, so that the reference defines every bit of it."""
    if op.key.kind == "conv2d":
        return op.key.precision in INTEGERS
    moves = op.key.kind in (
        "quantize",
        "dequantize",
        "requantize",
        "to_channels_last",
        "to_channels_first",
        "max_pool2d",
        "lookup",
    )
    return moves or (op.key.kind in ("add", "mul", "avg_pool2d", "concat") and op.key.dtypes[0] != "float32")


def _wrong_kernels(linker: Linker, program: Program, values: dict[str, np.ndarray]) -> list[str]:
    """Operations in integers whose kernel differs from the reference on the reference's inputs."""
    wrong = []
    for op, call in linker.calls(program.ops):
        if not _is_exact(op) or any(isinstance(name, str) and name not in values for name in call.arguments):
            continue
        names = iter(op.inputs)
        arguments = [_tensor(values[next(names)].ravel() if isinstance(one, str) else one.array) for one in call.arguments]
        poison = np.full(op.output.bytes, 0xA5, np.uint8).view(op.output.dtype)
        output = _tensor(poison)
        linker.cache.get([(call.symbol, call.kernel)])[call.symbol].library[call.symbol](*arguments, output)
        expected = run_op(op, [values[name] for name in op.inputs])
        if not np.array_equal(output.numpy().reshape(op.output.shape), expected):
            wrong.append(f"{op.name} ({op.key.kind}, {op.key.precision or op.key.dtypes})")
    return wrong
