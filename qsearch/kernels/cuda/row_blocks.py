"""Rows shared between the threads of a block.

Every thread holds elements of its row that are as far apart as the row has threads, in registers where they fit. Sums and
maxima go through shared memory, halved until one is left, always in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cuda.simt import constant, load, registers, shared, store, sync

__all__ = ["Element", "RowBlocks", "RowWriter"]

# Threads of a block, and the most of them where a row takes more.
THREADS, MOST_THREADS = 256, 1024
# Elements that a thread is to have, and those that it keeps in registers; those of longer rows it computes again.
FEW_ELEMENTS, MOST_ELEMENTS = 4, 16

# From which of a thread's elements to its value.
Element = Callable[[Expr | int], Expr]


@dataclass(frozen=True)
class RowBlocks:
    """How rows are divided.

    Attributes:
        count: Rows.
        length: Elements of a row.
    """

    count: int
    length: int

    @property
    def share(self) -> int:
        """Threads of a row, a power of two."""
        threads = 32
        while threads * FEW_ELEMENTS < self.length and threads < THREADS:
            threads *= 2
        while threads * MOST_ELEMENTS < self.length and threads < MOST_THREADS:
            threads *= 2
        return threads

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return max(1, min(THREADS // self.share, self.count))

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.rows * self.share

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.count // self.rows)

    @property
    def elements(self) -> int:
        """Elements of a thread; the last may not exist."""
        return -(-self.length // self.share)


class RowWriter:
    """Writes the statements of one thread.

    Attributes:
        plan: How rows are divided.
        base: Index of the row's first element.
    """

    def __init__(self, plan: RowBlocks, block: Expr, thread: Expr) -> None:
        self.plan, self._thread = plan, thread
        # TVM stumbles over quotients and differences that are always zero.
        alone = plan.rows == 1
        self._lane: Expr = thread if alone else thread % plan.share
        self._first: Expr | int = 0 if alone else thread // plan.share * plan.share
        row = block if alone else block * plan.rows + thread // plan.share
        self._exists = None if plan.count % plan.rows == 0 else row < plan.count
        # Threads without a row follow the last one's, because all threads meet at barriers.
        self.base = (row if self._exists is None else tirx.min(row, plan.count - 1)) * plan.length

    @property
    def _in_registers(self) -> bool:
        return self.plan.elements <= MOST_ELEMENTS

    def _index(self, i: Expr | int) -> Expr:
        return i * self.plan.share + self._lane

    def place(self, i: Expr | int) -> Expr:
        """Where in the row a thread's i-th element lies; the row's last element for one that does not exist."""
        whole = isinstance(i, int) and (i + 1) * self.plan.share <= self.plan.length
        return self._index(i) if whole else tirx.min(self._index(i), self.plan.length - 1)

    def kept(self, value: Element) -> Element:
        """Compute all elements once, or again whenever they are used where they are too many to be kept."""
        if not self._in_registers:
            return value
        held = registers(self.plan.elements, "float32")
        self._each(lambda i: store(held, i, value(i)))
        return lambda i: load(held, i)

    def scalar(self, value: Expr) -> Expr:
        """Compute a scalar once."""
        held = registers(1, "float32")
        store(held, 0, value)
        return load(held, 0)

    def reduced(self, value: Element, combine: Callable[[Expr, Expr], Expr], neutral: float) -> Expr:
        """Combine the elements of a row; every thread gets the result."""
        plan, total = self.plan, registers(1, "float32")
        store(total, 0, constant(neutral, "float32"))

        def take(i: Expr | int) -> None:
            element = value(i)
            if not isinstance(i, int) or (i + 1) * plan.share > plan.length:
                element = tirx.if_then_else(self._index(i) < plan.length, element, constant(neutral, "float32"))
            store(total, 0, combine(load(total, 0), element))

        self._each(take)
        partial = shared(plan.threads, "float32")
        store(partial, self._thread, load(total, 0))
        step = plan.share // 2
        while step:
            sync()
            with T.If(self._lane < step), T.Then():
                store(partial, self._thread, combine(load(partial, self._thread), load(partial, self._thread + step)))
            step //= 2
        sync()
        return self.scalar(load(partial, self._first))

    def each_existing(self, body: Callable[[Expr | int], None]) -> None:
        """Emit `body` for every element of a thread that exists."""

        def checked(i: Expr | int) -> None:
            conditions = [] if self._exists is None else [self._exists]
            if not isinstance(i, int) or (i + 1) * self.plan.share > self.plan.length:
                conditions.append(self._index(i) < self.plan.length)
            if conditions:
                with T.If(tirx.all(*conditions)), T.Then():
                    body(i)
            else:
                body(i)

        self._each(checked)

    def _each(self, body: Callable[[Expr | int], None]) -> None:
        if self._in_registers:
            for i in range(self.plan.elements):
                body(i)
        else:
            with T.serial(0, self.plan.elements) as i:
                body(i)
