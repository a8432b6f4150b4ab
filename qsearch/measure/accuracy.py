"""Accuracy of a compiled module, image by image, paired with float on the same images."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from qsearch.errors import MeasureError
from qsearch.measure.measurement import Accuracy
from qsearch.measure.processors import available_processors

__all__ = [
    "compare_accuracy",
    "divergences",
    "mean_divergence",
    "output_digest",
    "paired_interval",
    "run_batches",
    "run_blocks",
    "run_images",
]

# Normal quantile of a 95 % interval.
Z95 = 1.959963984540054
# Shares of a block per worker.
SHARES = 8


def run_images(
    open_machine: Callable[[], Any], images: np.ndarray, batch: int = 1, threads: int = 1, device: str = "cpu"
) -> np.ndarray:
    """Run a module on images, see `run_blocks`.

    Args:
        open_machine: Makes a virtual machine of the module; called once per worker.
        images: float32 (N, C, H, W).
        batch: Batch the module was compiled for.
        threads: Threads the module runs on.
        device: What it runs on, 'cpu' or 'cuda'.

    Returns:
        Logits, float32 (N, classes), in image order.

    Raises:
        MeasureError: The module fails, or yields NaN or infinity.
    """
    return next(run_blocks(open_machine, images, [np.arange(len(images))], batch, threads, device))


def run_blocks(
    open_machine: Callable[[], Any],
    images: np.ndarray,
    blocks: Sequence[np.ndarray],
    batch: int = 1,
    threads: int = 1,
    device: str = "cpu",
) -> Iterator[np.ndarray]:
    """Run a module on blocks of images, each when it is asked for: as many images at a time as there are processors.

    TVM gives every calling thread a pool of its own, so that one call per processor would not share but multiply
    a module's threads.

    Args:
        open_machine: Makes a virtual machine of the module; called once per worker.
        images: float32 (N, C, H, W).
        blocks: Positions of images; one that is no multiple of the batch is filled up with its last image.
        batch: Batch the module was compiled for.
        threads: Threads the module runs on.
        device: What it runs on, 'cpu' or 'cuda'.

    Yields:
        Logits of a block, float32 (block, classes).

    Raises:
        MeasureError: The module fails, or yields NaN or infinity.
    """
    # One caller keeps a GPU busy; several would wait for each other.
    workers = max(1, min(len(available_processors()) // threads, len(images))) if device == "cpu" else 1
    own = threading.local()

    def run_share(rows: np.ndarray) -> np.ndarray:
        if not hasattr(own, "machine"):
            own.machine = open_machine()
        return _run_share(own.machine, images, rows)

    with ThreadPoolExecutor(workers) as pool:
        for block in blocks:
            # More shares than workers: where something else is busy on one processor too, the others take its share.
            rows = _rows(block, batch)
            parts = list(pool.map(run_share, np.array_split(rows, min(SHARES * workers, len(rows)))))
            logits = np.concatenate(parts)[: len(block)]
            if not np.isfinite(logits).all():
                raise MeasureError(
                    "the module's output holds NaN or infinity; keep the layer before it in fp32 or widen its range"
                )
            yield logits


def run_batches(machine: Any, images: np.ndarray, batch: int = 1) -> np.ndarray:
    """Run a virtual machine on images in the calling thread; arguments and result as of `run_images`, nothing is checked."""
    return _run_share(machine, images, _rows(np.arange(len(images)), batch))[: len(images)]


def _rows(block: np.ndarray, batch: int) -> np.ndarray:
    """Positions of images, batch by batch, the last one filled up with its last image."""
    return np.pad(block, (0, -len(block) % batch), "edge").reshape(-1, batch)


def _run_share(machine: Any, images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.concatenate(list(machine.outputs(images[row] for row in rows)))


def compare_accuracy(logits: np.ndarray, float_logits: np.ndarray, labels: np.ndarray) -> Accuracy:
    """Score a module against float.

    Args:
        logits: float32 (N, classes) of the module.
        float_logits: float32 (N, classes) of the fp32 module on the same images.
        labels: int64 (N,).
    """
    right, float_right = logits.argmax(1) == labels, float_logits.argmax(1) == labels
    count = len(labels)
    return Accuracy(
        top1=100.0 * float(right.mean()),
        top5=100.0 * float(_among_best(logits, labels, 5).mean()),
        # Of counts, not of two rounded shares: one image of a hundred is 1 pp exactly, and no limit of 1 pp is missed by it.
        top1_loss_pp=100.0 * (int(float_right.sum()) - int(right.sum())) / count,
        top1_loss_ci_pp=paired_interval(int((float_right & ~right).sum()), int((~float_right & right).sum()), count),
        images=count,
        output_sha256=output_digest(logits),
        divergence=mean_divergence(float_logits, logits),
    )


def mean_divergence(float_logits: np.ndarray, logits: np.ndarray) -> float:
    """Mean over images of KL(float || module) between class probabilities, nats.

    Args:
        float_logits: float32 (N, classes).
        logits: float32 (N, classes).
    """
    return max(float(divergences(float_logits, logits).mean()), 0.0)


def divergences(float_logits: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL(float || module) of each image, nats, float64 (N,); arguments as of `mean_divergence`."""
    expected, given = _log_softmax(float_logits), _log_softmax(logits)
    return (np.exp(expected) * (expected - given)).sum(1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def output_digest(logits: np.ndarray) -> str:
    """Hexadecimal SHA-256 of every output byte: two modules with one digest compute the same, bit for bit."""
    return hashlib.sha256(np.ascontiguousarray(logits).tobytes()).hexdigest()


def _among_best(logits: np.ndarray, labels: np.ndarray, best: int) -> np.ndarray:
    """True where fewer than `best` classes score above the label's."""
    own = logits[np.arange(len(labels)), labels]
    return (logits > own[:, None]).sum(1) < best


def paired_interval(lost: int, gained: int, count: int) -> tuple[float, float]:
    """95 % interval of the loss in percentage points, from discordant pairs.

    Adjusted Wald for paired proportions (Bonett and Price, Improved confidence intervals for a linear
    function of binomial proportions, 2012): one pseudo-observation in each discordant cell, so that the
    interval has a width even when no image changed.

    Args:
        lost: Images that float has right and the module wrong.
        gained: Images that float has wrong and the module right.
        count: Number of images.
    """
    p, q = (lost + 1) / (count + 2), (gained + 1) / (count + 2)
    half = Z95 * np.sqrt(max(p + q - (p - q) ** 2, 0.0) / (count + 2))
    return 100.0 * float(p - q - half), 100.0 * float(p - q + half)
