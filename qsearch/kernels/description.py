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

    It is called with its inputs, then its packed constants, then its output: flat buffers all.

    Attributes:
        key: The operation it carries out.
        variant: What distinguishes this kernel from others for the same key: instruction set, tile, order.
        generate: Symbol name -> PrimFunc.
        pack: Constants of an operation -> constant arguments in call order, flat arrays.
        workspace_bytes: Scratch memory it allocates while running.
    """

    key: OpKey
    variant: tuple[Any, ...]
    generate: Callable[[str], Any]
    pack: Callable[[dict[str, np.ndarray]], tuple[np.ndarray, ...]]
    workspace_bytes: int = 0
