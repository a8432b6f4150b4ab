"""A linked module made ready to run, on the device that it was compiled for."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

__all__ = ["Machine", "on_device"]


class Machine(relax.VirtualMachine):
    """A Relax virtual machine that knows its device.

    Args:
        module: TVM module of a Relax executable, its kernels imported.
        device: 'cpu' or 'cuda'; of several GPUs the first.
    """

    def __init__(self, module: Any, device: str) -> None:
        # Of the executable's module itself: from an executable, TVM would link everything again.
        super().__init__(module, tvm.device(device, 0))
        self.place = tvm.device(device, 0)

    @property
    def on_cpu(self) -> bool:
        """Whether its kernels run in the calling thread and its pool."""
        return bool(self.place.dlpack_device_type() == tvm.cpu().dlpack_device_type())

    def tensor(self, array: np.ndarray) -> Any:
        """An argument for it: an array in its device's memory."""
        return tvm.runtime.tensor(np.ascontiguousarray(array), device=self.place)


def on_device(array: np.ndarray, device: str) -> Any:
    """An array in a device's memory."""
    return tvm.runtime.tensor(np.ascontiguousarray(array), device=tvm.device(device, 0))
