"""Learned rounding of a whole configuration, block after block or layer after layer, each kept on disk by content.

What a block learns depends on all roundings before it. Its file is therefore named after these too: the same
configuration costs nothing the second time, and after a change of a late layer only what follows is learned again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qsearch.models.content import array_digest, value_digests
from qsearch.models.graph import Model
from qsearch.models.interpret import one_thread
from qsearch.qtype import IntRange
from qsearch.quantize.rounding.blocks import Block, blocks_of, divided
from qsearch.quantize.rounding.learned import BlockData, LearnSettings, RoundedLayer, Roundings, learn_block, run_block
from qsearch.quantize.rounding.rounding_file import load_rounding, rounding_path, save_rounding

__all__ = ["LearnRequest", "learn_network"]

# Raised whenever the same request would be answered with other numbers.
_VERSION = 1


@dataclass(frozen=True, eq=False)
class LearnRequest:
    """A configuration to learn.

    Attributes:
        model: The float model.
        start: Layer name -> its rounding to start from, of every layer that is not float.
        limits: Layer name -> range of its integers, of the layers whose integers are learned. In the blocks that have
            one, scales of these and biases of all rounded layers are learned too; other blocks stay as they are.
        roundings: Quantizers of what its nodes read.
        alone: Layers that are learned by their own output; the blocks that have one are divided into their nodes.
        settings: How to learn.
    """

    model: Model
    start: Mapping[str, RoundedLayer]
    limits: Mapping[str, IntRange]
    roundings: Roundings
    alone: frozenset[str] = frozenset()
    settings: LearnSettings = LearnSettings()


@one_thread()
def learn_network(
    request: LearnRequest,
    images: Callable[[], np.ndarray],
    source: str,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, RoundedLayer]:
    """Learn every block that has something to learn, as far as it is not on disk.

    Args:
        request: What to learn.
        images: Gives the calibration images, float32 (N, C, H, W), preprocessed; called if anything is missing.
        source: Digest of these images.
        folder: Where learned blocks are kept.
        progress: Called after every block with the number of blocks done and their total; not if all were kept.

    Returns:
        Layer name -> the layer, for all of `request.start`.

    Raises:
        QuantizeError: There are too few images, or a block is not finite.
        StudyError: A result cannot be written.
    """
    blocks = divided(blocks_of(request.model.graph), request.alone)
    digests = _digests(request, blocks, source)
    kept = [_kept(request, block, digest, folder) for block, digest in zip(blocks, digests, strict=True)]
    if None in kept:
        first = torch.tensor(np.ascontiguousarray(images(), np.float32))
        real, given = {request.model.graph.input.name: first}, {request.model.graph.input.name: first}
        # Whatever lies behind the last block that is missing is known, and need not be run.
        last = max(i for i, found in enumerate(kept) if found is None)
        for i, block in enumerate(blocks[: last + 1]):
            model, layers = block.model(request.model), kept[i]
            target = run_block(model, real[block.source], {}, {}, _of(real, block.others))
            entry, known = given[block.source], _of(given, block.others)
            if layers is None:
                start, limits = _of(request.start, block.layers), _of(request.limits, block.layers)
                layers = learn_block(model, start, limits, BlockData(entry, target, request.roundings, known), request.settings)
                _keep(layers, block, digests[i], folder)
                kept[i] = layers
            passed = block.nodes[-1].name
            real[passed], given[passed] = target, run_block(model, entry, request.roundings, layers, known)
            read = {name for later in blocks[i + 1 : last + 1] for name in (later.source, *later.others)}
            real, given = _of(real, read), _of(given, read)
            if progress is not None:
                progress(i + 1, len(blocks))
    return {name: layer for layers in kept if layers is not None for name, layer in layers.items()}


def _of(table: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: table[name] for name in names if name in table}


def _kept(request: LearnRequest, block: Block, digest: str, folder: Path) -> dict[str, RoundedLayer] | None:
    """A block's layers if they are on disk, or if there is nothing to learn."""
    start = _of(request.start, block.layers)
    if not _of(request.limits, block.layers):
        return start
    found = {}
    for name in start:
        loaded = load_rounding(_path(folder, block, digest, name))
        if loaded is None or loaded[1] is None:
            return None
        found[name] = RoundedLayer(loaded[0], loaded[1])
    return found


def _keep(layers: Mapping[str, RoundedLayer], block: Block, digest: str, folder: Path) -> None:
    for name, layer in layers.items():
        save_rounding(layer.weight, _path(folder, block, digest, name), layer.shift)


def _path(folder: Path, block: Block, digest: str, name: str) -> Path:
    return rounding_path(folder, {"method": "learned", "block": digest, "layer": block.layers.index(name)})


def _digests(request: LearnRequest, blocks: Sequence[Block], source: str) -> list[str]:
    """Digest of all that each block's result depends on: its float values, the roundings in it and those before it."""
    values, found, before = value_digests(request.model, source), [], source
    for block in blocks:
        content = {
            "version": _VERSION,
            "settings": asdict(request.settings),
            "before": before,
            "values": [values[node.name] for node in block.nodes],
            "start": [_described(request, name) for name in block.layers],
            "roundings": [
                [i, j, [[float(one.scale).hex(), one.zero_point, asdict(one.limits)] for one in request.roundings[node.name, j]]]
                for i, node in enumerate(block.nodes)
                for j in range(len(node.inputs))
                if (node.name, j) in request.roundings
            ],
        }
        before = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        found.append(before)
    return found


def _described(request: LearnRequest, name: str) -> list[Any] | None:
    if name not in request.start:
        return None
    layer, limits = request.start[name], request.limits.get(name)
    arrays = [array_digest(array) for array in (layer.weight.values, layer.weight.scale, layer.shift)]
    return [*arrays, None if limits is None else asdict(limits)]
