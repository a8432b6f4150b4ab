"""Execute a CUDA kernel's PrimFunc without a GPU: all threads of some blocks side by side, statement by statement.

It is stricter than a GPU. Outputs start poisoned; an error is raised for an access outside a buffer, a misaligned vector
access, a read of shared memory or registers that nothing was written to, a read of what another thread wrote since the last
barrier, a write to what another thread has read or written since, and a read of an asynchronous copy that was not waited
for. Matrix instructions follow the fragment layouts of the PTX ISA ("Warp Level Matrix Multiply-Accumulate").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

# Blocks that run side by side.
BLOCKS = 64
NOBODY, MANY = -1, -2


class KernelFault(AssertionError):
    """The kernel does what a GPU may punish."""


def emulate(function: Any, arrays: list[np.ndarray]) -> None:
    """Run a kernel.

    Args:
        function: A PrimFunc whose body is one grid of blocks of threads.
        arrays: Flat arrays in argument order, written in place.
    """
    memory = {}
    for buffer, array in zip(function.params, arrays, strict=True):
        memory[_key(buffer)] = _Global(buffer.name, array)
    blocks, threads, block_var, thread_var, body = _launch(function.body)
    for first in range(0, blocks, BLOCKS):
        count = min(BLOCKS, blocks - first)
        state = _Block(count, threads, memory)
        state.values[_key(block_var)] = (first + np.repeat(np.arange(count), threads)).astype(np.int32)
        state.values[_key(thread_var)] = np.tile(np.arange(threads), count).astype(np.int32)
        state.run(body)


def _key(var: Any) -> int:
    return int(var.__hash__())


def _launch(statement: Any) -> tuple[int, int, Any, Any, Any]:
    extents: dict[str, tuple[int, Any]] = {}
    while type(statement).__name__ == "AttrStmt":
        axis = statement.node
        extents[str(axis.thread_tag)] = int(statement.value), axis.var
        statement = statement.body
    (blocks, block), (threads, thread) = extents["blockIdx.x"], extents["threadIdx.x"]
    return blocks, threads, block, thread, statement


@dataclass
class _Global:
    """An argument; every access is checked against its bounds."""

    name: str
    array: np.ndarray

    def read(self, block: _Block, index: np.ndarray) -> np.ndarray:
        return self.array[self.checked(block, index)]

    def write(self, block: _Block, index: np.ndarray, value: np.ndarray) -> None:
        index, active = self.checked(block, index), block.mask
        self.array[index[active]] = value[active]

    def checked(self, block: _Block, index: np.ndarray) -> np.ndarray:
        inside = (index >= 0) & (index < len(self.array))
        if not inside[block.mask].all():
            wrong = index[block.mask][~inside[block.mask]]
            raise KernelFault(f"argument {self.name} of {len(self.array)} elements is accessed at {wrong.ravel()[0]}")
        return np.where(inside, index, 0)

    def bytes_at(self, block: _Block, index: np.ndarray, count: int) -> np.ndarray:
        """uint8 (lanes, count) from element `index` on."""
        size = self.array.itemsize
        start = self.checked(block, index) * size
        if ((start % count)[block.mask]).any():
            raise KernelFault(f"argument {self.name}: a copy of {count} bytes is not aligned")
        data = self.array.view(np.uint8)
        if (start[block.mask] + count > len(data)).any():
            raise KernelFault(f"argument {self.name} is read beyond its end")
        return data[np.minimum(start, len(data) - count)[:, None] + np.arange(count)]


@dataclass
class _Local:
    """Registers of every thread."""

    array: np.ndarray
    written: np.ndarray

    def read(self, block: _Block, index: np.ndarray) -> np.ndarray:
        rows, index = self._places(block, index)
        if not self.written[rows, index][block.mask].all():
            raise KernelFault("a register is read that nothing was written to")
        return self.array[rows, index]

    def write(self, block: _Block, index: np.ndarray, value: np.ndarray) -> None:
        rows, index = self._places(block, index)
        rows, active = np.broadcast_to(rows, index.shape), block.mask
        self.array[rows[active], index[active]] = value[active]
        self.written[rows[active], index[active]] = True

    def _places(self, block: _Block, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inside = (index >= 0) & (index < self.array.shape[1])
        if not inside[block.mask].all():
            raise KernelFault(f"{self.array.shape[1]} registers are accessed at {index[block.mask].max()}")
        rows = np.arange(block.lanes).reshape(-1, *(1,) * (index.ndim - 1))
        return rows, np.where(inside, index, 0)

    def words(self, index: np.ndarray, count: int, dtype: Any) -> np.ndarray:
        """A view of `count` words of 4 bytes from element `index` (the same in all threads), (lanes, count)."""
        start = int(index.flat[0]) * self.array.itemsize
        assert (index == index.flat[0]).all(), "fragments lie at the same registers in every thread"
        data = self.array.view(np.uint8)[:, start : start + 4 * count]
        return np.ascontiguousarray(data).view(dtype)

    def put_words(self, block: _Block, index: np.ndarray, words: np.ndarray) -> None:
        start, size = int(index.flat[0]), self.array.itemsize
        count = words.shape[1] * 4 // size
        self.array[block.mask, start : start + count] = np.ascontiguousarray(words).view(self.array.dtype)[block.mask]
        self.written[block.mask, start : start + count] = True


@dataclass
class _Shared:
    """Shared memory of every block, byte by byte with who touched it since the last barrier."""

    dtype: Any
    data: np.ndarray
    epoch: int = 0
    writer: np.ndarray = field(init=False)
    write_epoch: np.ndarray = field(init=False)
    reader: np.ndarray = field(init=False)
    read_epoch: np.ndarray = field(init=False)
    in_flight: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.writer = np.full(self.data.shape, NOBODY, np.int32)
        self.write_epoch = np.full(self.data.shape, -1, np.int32)
        self.reader = np.full(self.data.shape, NOBODY, np.int32)
        self.read_epoch = np.full(self.data.shape, -1, np.int32)
        self.in_flight = np.full(self.data.shape, -1, np.int32)

    @property
    def size(self) -> int:
        return int(np.dtype(self.dtype).itemsize)

    def read(self, block: _Block, index: np.ndarray) -> np.ndarray:
        raw = self.load_bytes(block, index * self.size, self.size)
        return np.ascontiguousarray(raw).view(self.dtype)[..., 0]

    def write(self, block: _Block, index: np.ndarray, value: np.ndarray) -> None:
        raw = np.ascontiguousarray(value[..., None]).view(np.uint8)
        self.store_bytes(block, index * self.size, raw)

    def _places(self, block: _Block, start: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Active block rows, byte places and threads, each flat."""
        active = block.mask
        start = start[active]
        if (start < 0).any() or (start + count > self.data.shape[1]).any():
            raise KernelFault(
                f"shared memory of {self.data.shape[1]} bytes is accessed from {start.min()} to {start.max() + count}"
            )
        places = start[..., None] + np.arange(count)
        shape = (-1, *(1,) * (places.ndim - 1))
        rows = np.broadcast_to(block.block_of[active].reshape(shape), places.shape)
        threads = np.broadcast_to(block.thread_of[active].reshape(shape), places.shape)
        return rows.reshape(-1), places.reshape(-1), threads.reshape(-1)

    def load_bytes(self, block: _Block, start: np.ndarray, count: int) -> np.ndarray:
        """uint8 (lanes, ..., count)."""
        rows, places, threads = self._places(block, start, count)
        if (self.write_epoch[rows, places] < 0).any():
            raise KernelFault("shared memory is read that nothing was written to")
        if (self.in_flight[rows, places] >= 0).any():
            raise KernelFault("shared memory is read before the copy into it was waited for")
        if ((self.write_epoch[rows, places] == self.epoch) & (self.writer[rows, places] != threads)).any():
            raise KernelFault("shared memory is read that another thread wrote since the last barrier")
        others = (self.read_epoch[rows, places] == self.epoch) & (self.reader[rows, places] != threads)
        self.reader[rows, places] = np.where(others, MANY, threads)
        # Several threads of one statement may read the same byte.
        order = np.argsort(rows * self.data.shape[1] + places, kind="stable")
        same = (np.diff(rows[order]) == 0) & (np.diff(places[order]) == 0) & (np.diff(threads[order]) != 0)
        again = order[1:][same]
        self.reader[rows[again], places[again]] = MANY
        self.read_epoch[rows, places] = self.epoch
        found = np.zeros((*start.shape, count), np.uint8)
        found[block.mask] = self.data[rows, places].reshape(-1, *start.shape[1:], count)
        return found

    def store_bytes(self, block: _Block, start: np.ndarray, value: np.ndarray, group: int = -1) -> None:
        """Write uint8 (lanes, ..., count)."""
        rows, places, threads = self._places(block, start, value.shape[-1])
        if ((self.read_epoch[rows, places] == self.epoch) & (self.reader[rows, places] != threads)).any():
            raise KernelFault("shared memory is written that another thread has read since the last barrier")
        if ((self.write_epoch[rows, places] == self.epoch) & (self.writer[rows, places] != threads)).any():
            raise KernelFault("shared memory is written that another thread wrote since the last barrier")
        if (self.in_flight[rows, places] >= 0).any():
            raise KernelFault("shared memory is written while a copy into it is under way")
        self.data[rows, places] = value[block.mask].reshape(-1)
        self.writer[rows, places], self.write_epoch[rows, places] = threads, self.epoch
        self.in_flight[rows, places] = group
        if not (self.writer[rows, places] == threads).all():
            raise KernelFault("several threads write the same byte of shared memory at once")

    def arrive(self, last_done: int) -> None:
        """Copies of the groups up to `last_done` are complete: as if their threads had written just now."""
        done = (self.in_flight >= 0) & (self.in_flight <= last_done)
        self.write_epoch[done] = self.epoch
        self.in_flight[done] = -1


@dataclass
class _Address:
    memory: Any
    index: np.ndarray


class _Block:
    """Some blocks in execution."""

    def __init__(self, count: int, threads: int, memory: dict[int, Any]) -> None:
        self.count, self.threads, self.lanes = count, threads, count * threads
        self.memory, self.values = dict(memory), {}
        self.mask = np.ones(self.lanes, bool)
        self.block_of, self.thread_of = np.repeat(np.arange(count), threads), np.tile(np.arange(threads), count)
        self.group = 0

    # Statements.

    def run(self, statement: Any) -> None:
        getattr(self, "_run_" + type(statement).__name__.lower())(statement)

    def _run_seqstmt(self, statement: Any) -> None:
        for part in statement.seq:
            self.run(part)

    def _run_allocbuffer(self, statement: Any) -> None:
        buffer = statement.buffer
        size, dtype = int(np.prod([int(extent) for extent in buffer.shape])), _numpy(str(buffer.dtype))
        if buffer.scope() == "local":
            poison = np.full((self.lanes, size * np.dtype(dtype).itemsize), 0xA5, np.uint8).view(dtype)
            self.memory[_key(buffer)] = _Local(poison, np.zeros((self.lanes, size), bool))
        else:
            assert buffer.scope() == "shared", buffer.scope()
            self.memory[_key(buffer)] = _Shared(dtype, np.full((self.count, size * np.dtype(dtype).itemsize), 0xA5, np.uint8))

    def _run_bufferstore(self, statement: Any) -> None:
        index = self.lanes_of(statement.indices[0])
        value = self.evaluate(statement.value)
        self._aligned(statement.indices[0], index)
        target = self.memory[_key(statement.buffer)]
        value = np.broadcast_to(np.asarray(value, _numpy(str(statement.buffer.dtype))), index.shape)
        target.write(self, index, value)

    def _run_evaluate(self, statement: Any) -> None:
        self.evaluate(statement.value)

    def _run_for(self, statement: Any) -> None:
        start, extent = self.evaluate(statement.min), self.evaluate(statement.extent)
        if np.ndim(extent) and not (extent[self.mask] == extent[self.mask].flat[0]).all():
            self._ragged(statement, extent)
            return
        for i in range(int(np.max(extent))):
            self.values[_key(statement.loop_var)] = start + np.int32(i)
            self.run(statement.body)

    def _ragged(self, statement: Any, extent: np.ndarray) -> None:
        """A loop that threads leave at different times."""
        before = self.mask
        for i in range(int(extent[before].max())):
            self.mask = before & (extent > i)
            self.values[_key(statement.loop_var)] = self.evaluate(statement.min) + np.int32(i)
            self.run(statement.body)
        self.mask = before

    def _run_ifthenelse(self, statement: Any) -> None:
        before, condition = self.mask, np.broadcast_to(self.evaluate(statement.condition), (self.lanes,))
        for case, chosen in ((statement.then_case, before & condition), (statement.else_case, before & ~condition)):
            if case is not None and chosen.any():
                self.mask = chosen
                self.run(case)
        self.mask = before

    # Expressions.

    def lanes_of(self, expression: Any) -> np.ndarray:
        """A value in every lane, (lanes,) or (lanes, vector)."""
        value = np.asarray(self.evaluate(expression))
        return np.broadcast_to(value, (self.lanes,)) if value.ndim == 0 else value

    def evaluate(self, expression: Any) -> Any:
        name = type(expression).__name__
        if name in _BINARY:
            a, b = self.evaluate(expression.a), self.evaluate(expression.b)
            return _BINARY[name](a, b)
        return getattr(self, "_evaluate_" + name.lower())(expression)

    def _evaluate_intimm(self, expression: Any) -> Any:
        return np.dtype(_numpy(str(expression.ty.dtype))).type(expression.value)

    _evaluate_floatimm = _evaluate_intimm

    def _evaluate_stringimm(self, expression: Any) -> str:
        return str(expression.value)

    def _evaluate_var(self, expression: Any) -> Any:
        return self.values[_key(expression)]

    def _evaluate_cast(self, expression: Any) -> Any:
        value = np.asarray(self.evaluate(expression.value))
        return value.astype(_numpy(str(expression.ty.dtype)))

    def _evaluate_not(self, expression: Any) -> Any:
        return np.logical_not(self.evaluate(expression.a))

    def _evaluate_and(self, expression: Any) -> Any:
        return self._lazily(expression.a, lambda: self.evaluate(expression.b), lambda: np.bool_(False))

    def _evaluate_or(self, expression: Any) -> Any:
        return self._lazily(expression.a, lambda: np.bool_(True), lambda: self.evaluate(expression.b))

    def _evaluate_select(self, expression: Any) -> Any:
        yes, no = (lambda: self.evaluate(expression.true_value)), (lambda: self.evaluate(expression.false_value))
        return self._lazily(expression.condition, yes, no)

    def _lazily(self, condition: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
        """Only the lanes that take a branch compute it."""
        chosen, before = np.broadcast_to(np.asarray(self.evaluate(condition), bool), (self.lanes,)), self.mask
        found = []
        for branch, mask in ((yes, before & chosen), (no, before & ~chosen)):
            self.mask = mask
            found.append(branch() if mask.any() else None)
        self.mask = before
        if found[0] is None or found[1] is None:
            return found[1] if found[0] is None else found[0]
        return np.where(chosen, *found)

    def _evaluate_ramp(self, expression: Any) -> np.ndarray:
        base = self.lanes_of(expression.base)
        return base[:, None] + (np.arange(int(expression.lanes)) * int(expression.stride)).astype(np.int32)

    def _evaluate_broadcast(self, expression: Any) -> np.ndarray:
        return np.repeat(self.lanes_of(expression.value)[:, None], int(expression.lanes), axis=1)

    def _evaluate_tensorload(self, expression: Any) -> np.ndarray:
        index = self.lanes_of(expression.indices[0])
        self._aligned(expression.indices[0], index)
        return self.memory[_key(expression.source)].read(self, index)

    _evaluate_bufferload = _evaluate_tensorload

    def _aligned(self, place: Any, index: np.ndarray) -> None:
        if type(place).__name__ == "Ramp" and (index[self.mask][:, 0] % index.shape[1]).any():
            raise KernelFault(f"a vector of {index.shape[1]} elements is not aligned")

    def _evaluate_call(self, expression: Any) -> Any:
        name = str(expression.op.name).removeprefix("tirx.").removeprefix("prim.")
        if name == "cuda.func_call":
            function, *arguments = expression.args[:-1]
            return self._call(str(function.value), [self.evaluate(argument) for argument in arguments])
        if name == "address_of":
            (access,) = expression.args
            return _Address(self.memory[_key(access.source)], self.lanes_of(access.indices[0]))
        if name == "isnullptr":
            return False
        if name == "if_then_else":
            condition, yes, no = expression.args
            return self._lazily(condition, lambda: self.evaluate(yes), lambda: self.evaluate(no))
        if name == "tvm_storage_sync":
            if not (self.mask.all() or not self.mask.any()):
                raise KernelFault("not all threads reach a barrier")
            for memory in self.memory.values():
                if isinstance(memory, _Shared):
                    memory.epoch += 1
            return None
        return _PURE[name](*(self.evaluate(argument) for argument in expression.args))

    # Device functions, see qsearch.kernels.cuda.device.

    def _call(self, name: str, arguments: list[Any]) -> Any:
        if name in _DEVICE:
            return _DEVICE[name](*arguments)
        kind, _, number = name.rpartition("_")
        if kind in ("qs_copy", "qs_copy_cached"):
            to, source = arguments
            moved = source.memory.bytes_at(self, source.index, int(number))
            self._shared_at(to, int(number))
            to.memory.store_bytes(self, to.index * to.memory.size, moved, self.group)
        elif kind == "qs_fill":
            to, word = arguments
            words = np.broadcast_to(np.asarray(word, np.int32), (self.lanes,))
            self._shared_at(to, int(number))
            to.memory.store_bytes(self, to.index * to.memory.size, np.repeat(words[:, None], int(number) // 4, 1).view(np.uint8))
        elif kind == "qs_put":
            to, source = arguments
            self._shared_at(to, int(number))
            word = source.memory.read(self, source.index[:, None] + np.arange(int(number) // source.memory.array.itemsize))
            to.memory.store_bytes(self, to.index * to.memory.size, np.ascontiguousarray(word).view(np.uint8))
        elif name == "qs_word":
            (source,) = arguments
            return np.ascontiguousarray(source.memory.bytes_at(self, source.index, 4)).view(np.int32)[:, 0]
        elif name == "qs_copies_commit":
            self.group += 1
        elif kind == "qs_copies_wait":
            for memory in self.memory.values():
                if isinstance(memory, _Shared):
                    memory.arrive(self.group - int(number) - 1)
        elif kind == "qs_load_matrices":
            self._load_matrices(*arguments, count=int(number))
        elif name in _DOTS:
            sums, left, right = arguments
            dtype, sum_dtype, exact = _DOTS[name]
            factors = (
                np.ascontiguousarray(x.memory.words(x.index, 4, np.uint32)).view(dtype).astype(exact) for x in (left, right)
            )
            total = sums.memory.words(sums.index, 1, sum_dtype)[:, 0].astype(exact) + np.multiply(*factors).sum(1)
            sums.memory.put_words(self, sums.index, total.astype(sum_dtype)[:, None].view(np.uint32))
        elif name in _MATRIX:
            self._whole_warps()
            sums, left, right = arguments
            _MATRIX[name](self, sums, left, right)
        else:
            raise NotImplementedError(name)
        return None

    def _shared_at(self, address: _Address, count: int) -> None:
        if ((address.index * address.memory.size % count)[self.mask]).any():
            raise KernelFault(f"{count} bytes of shared memory are not aligned")

    def _whole_warps(self) -> None:
        warps = self.mask.reshape(-1, 32)
        if not (warps.all(1) | ~warps.any(1)).all():
            raise KernelFault("only some threads of a warp reach a matrix instruction")

    def _load_matrices(self, to: _Address, row: _Address, count: int) -> None:
        self._whole_warps()
        self._shared_at(row, 16)
        before = self.mask
        # Of two matrices only the first sixteen lanes' addresses count.
        self.mask = before & (self.thread_of % 32 < 8 * count)
        rows = row.memory.load_bytes(self, row.index * row.memory.size, 16)
        self.mask = before
        matrices = rows.reshape(-1, 32, 4, 4)[:, : 8 * count].reshape(-1, count, 8, 4, 4)
        # Word j of lane l: the l % 4-th pair of row l / 4 of matrix j.
        words = matrices.transpose(0, 2, 3, 1, 4).reshape(self.lanes, count * 4)
        to.memory.put_words(self, to.index, words.view(np.uint32))


def _fragments(block: _Block, address: _Address, count: int, dtype: Any) -> np.ndarray:
    """(warps, 8 groups, 4 threads, words, elements of a word) of a fragment."""
    words = address.memory.words(address.index, count, np.uint32)
    elements = np.ascontiguousarray(words).view(dtype)
    return elements.reshape(-1, 8, 4, count, 4 // np.dtype(dtype).itemsize)


def _multiply(
    block: _Block, sums: _Address, left: _Address, right: _Address, dtypes: tuple[Any, Any], sum_dtype: Any, exact: Any
) -> None:
    """m16n8kX with A in four words and B in two: word w of A holds rows g + 8 (w % 2), columns X / 2 (w / 2) onwards."""
    a, b = _fragments(block, left, 4, dtypes[0]), _fragments(block, right, 2, dtypes[1])
    if dtypes[0] is np.float32:
        # Of its operands' bits tf32 knows the upper 19.
        a, b = ((x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for x in (a, b))
    warps, each = a.shape[0], a.shape[-1]
    half = 4 * each
    # (warp, row half, group, k half, thread, element) -> (warp, 16, K)
    rows = a.reshape(warps, 8, 4, 2, 2, each).transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, 2 * half)
    columns = b.transpose(0, 1, 3, 2, 4).reshape(warps, 8, 2 * half)
    product = np.einsum("wik,wjk->wij", rows.astype(exact), columns.astype(exact))
    # c0, c1: row g, columns 2t, 2t + 1; c2, c3: row g + 8.
    spread = product.reshape(warps, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(block.lanes, 4)
    before = sums.memory.words(sums.index, 4, sum_dtype)
    total = (before.astype(exact) + spread).astype(sum_dtype)
    sums.memory.put_words(block, sums.index, total.view(np.uint32))


def _numpy(dtype: str) -> Any:
    return {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "bool": np.bool_}.get(dtype, dtype)


def _erf(x: Any) -> Any:
    from math import erf

    return np.vectorize(erf, otypes=[np.float32])(x)


def _floor_divide(a: Any, b: Any) -> Any:
    return np.floor_divide(a, b)


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "FloorDiv": _floor_divide,
    "FloorMod": np.mod,
    "Min": np.minimum,
    "Max": np.maximum,
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "BitwiseAnd": np.bitwise_and,
    "BitwiseOr": np.bitwise_or,
    "BitwiseXor": np.bitwise_xor,
    "LShift": np.left_shift,
    "RShift": np.right_shift,
}
_PURE: dict[str, Callable[..., Any]] = {
    "exp": np.exp,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: np.float32(1) / np.sqrt(x),
    "tanh": np.tanh,
    "erf": _erf,
    "fabs": np.abs,
    "bitwise_and": np.bitwise_and,
    "bitwise_or": np.bitwise_or,
    "bitwise_xor": np.bitwise_xor,
    "shift_left": np.left_shift,
    "shift_right": np.right_shift,
}
_DEVICE: dict[str, Callable[..., Any]] = {
    "qs_mul": np.multiply,
    "qs_add": np.add,
    "qs_fma": lambda a, b, c: (np.float64(a) * b + c).astype(np.float32),
    "qs_round": lambda a: np.rint(a).astype(np.int32),
}


def _bytes(words: Any, dtype: Any) -> np.ndarray:
    """(lanes, 4) from int32 words."""
    return np.atleast_1d(np.asarray(words, np.int32))[:, None].view(dtype)


def _permute(a: Any, b: Any, chosen: Any) -> Any:
    both = np.concatenate(np.broadcast_arrays(_bytes(a, np.uint8), _bytes(b, np.uint8)), axis=1)
    picked = [both[:, int(chosen) >> 4 * i & 7] for i in range(4)]
    return np.ascontiguousarray(np.stack(picked, 1)).view(np.int32)[:, 0]


_DEVICE |= {
    "qs_dot_bytes": lambda total, a, b: (
        total + (_bytes(a, np.uint8).astype(np.int32) * _bytes(b, np.int8)).sum(1, dtype=np.int32)
    ),
    "qs_permute": _permute,
}
_DOTS: dict[str, tuple[Any, Any, Any]] = {
    "qs_dot_f32": (np.float32, np.float32, np.float64),
    "qs_dot_s16": (np.int16, np.int32, np.int64),
}
_MATRIX: dict[str, Callable[..., None]] = {
    "qs_mma_u8s8": lambda *a: _multiply(*a, dtypes=(np.uint8, np.int8), sum_dtype=np.int32, exact=np.int64),
    "qs_mma_u8u8": lambda *a: _multiply(*a, dtypes=(np.uint8, np.uint8), sum_dtype=np.int32, exact=np.int64),
    "qs_mma_e4m3": lambda *a: _multiply(*a, dtypes=(ml_dtypes.float8_e4m3fn,) * 2, sum_dtype=np.float32, exact=np.float64),
    "qs_mma_tf32": lambda *a: _multiply(*a, dtypes=(np.float32, np.float32), sum_dtype=np.float32, exact=np.float64),
    "qs_mma_f16": lambda *a: _multiply(*a, dtypes=(np.float16, np.float16), sum_dtype=np.float32, exact=np.float64),
}


def run_emulated(op: Any, inputs: list[np.ndarray], arch: str = "sm_90", kernel: Any = None) -> np.ndarray:
    """An operation's output as its CUDA kernel computes it, the output poisoned first."""
    from qsearch.kernels.cuda import describe_kernel

    kernel = kernel or describe_kernel(op.key, arch)
    constants = list(kernel.pack(op.constants))
    if kernel.pack_weight is not None:
        constants.insert(0, kernel.pack_weight(op.constants))
    output = np.full(op.output.size * np.dtype(_numpy(op.output.dtype)).itemsize, 0xA5, np.uint8).view(_numpy(op.output.dtype))
    given = [np.array(array, order="C").ravel() for array in (*inputs, *constants)]
    before = [array.copy() for array in given]
    emulate(kernel.generate("emulated"), [*given, output])
    for i, array in enumerate(given):
        assert i == kernel.writes_over or np.array_equal(array.view(np.uint8), before[i].view(np.uint8)), f"input {i} was written"
    return output.reshape(op.output.shape)
