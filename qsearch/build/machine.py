"""A linked module made ready to run, on the device that it was compiled for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
        # Whether its kernels run in the calling thread and its pool.
        self.on_cpu = bool(self.place.dlpack_device_type() == tvm.cpu().dlpack_device_type())

    def tensor(self, array: np.ndarray) -> Any:
        """An argument for it: an array in its device's memory."""
        return tvm.runtime.tensor(np.ascontiguousarray(array), device=self.place)

    def outputs(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """What it computes of batches, all of one shape and dtype, one after the other; each an array of its own.

        They are copied into one argument: to make one for each takes a fifth of a small network's time.
        """
        main, given = self["main"], None
        for batch in batches:
            given = self.tensor(batch) if given is None else given.copyfrom(batch)
            found = main(given)
            # TVM's own copy takes longer; a view would be of memory that the next call may write to.
            yield np.from_dlpack(found).copy() if self.on_cpu else found.numpy()


def on_device(array: np.ndarray, device: str) -> Any:
    """An array in a device's memory."""
    return tvm.runtime.tensor(np.ascontiguousarray(array), device=tvm.device(device, 0))
