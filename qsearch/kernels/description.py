"""A kernel as data: everything needed to identify, generate and call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qsearch.quantize.program import OpKey

__all__ = ["Kernel"]


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    It is called with its inputs, its packed weight where it has one, its packed constants, then its output:
    flat buffers all.

    Attributes:
        key: The operation it carries out.
        variant: What distinguishes this kernel from others for the same key: instruction set, tile, order.
        generate: Symbol name -> PrimFunc.
        pack: Constants of an operation other than its weight -> constant arguments in call order, flat arrays.
        workspace_bytes: Scratch memory it allocates while running.
        pack_weight: Constants of an operation -> its weight, a flat array in the order the kernel reads it; depends on
            the weight and the variant only, so that packed weights can be kept.
        writes_over: Index of an input whose memory the output may take: every element of it is read before the same
            element of the output is written, and never again. None for no input.
    """

    key: OpKey
    variant: tuple[Any, ...]
    generate: Callable[[str], Any]
    pack: Callable[[dict[str, np.ndarray]], tuple[np.ndarray, ...]]
    workspace_bytes: int = 0
    pack_weight: Callable[[dict[str, np.ndarray]], np.ndarray] | None = None
    writes_over: int | None = None
