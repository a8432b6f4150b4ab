"""Fine-tune one configuration and measure what comes of it, as a trial is measured and by the images that judge a front."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qsearch.config import QuantConfig
from qsearch.errors import BundleError, UsageError
from qsearch.measure.accuracy import run_batches
from qsearch.measure.measurement import Measurement
from qsearch.qat.checkpoint import CheckpointFolder, Epoch
from qsearch.qat.network import FakeQuantizedNetwork
from qsearch.qat.plan import QatPlan, plan_finetuning
from qsearch.qat.train import Teacher, TrainSettings, threads_for, train
from qsearch.qat.training_images import Judged, TrainingImages, builtin_images, directory_images
from qsearch.quantize.program import Program
from qsearch.search.front import Heldout

if TYPE_CHECKING:
    from qsearch.search.evaluation.objective import ModelEvaluator

__all__ = ["CHECKPOINTS", "LEAST_AGREEMENT", "Agreement", "Finetuned", "checkpoint_folder", "finetune", "open_images"]

CHECKPOINTS = Path("studies/finetune")
# Share of images on which the compiled module must decide as the network that was trained.
LEAST_AGREEMENT = 0.999
AGREEMENT_BATCH = 250


@dataclass(frozen=True)
class Agreement:
    """How often the compiled module decides as the fake-quantized network, on search and held-out images.

    Attributes:
        same: Images on which both have the same best class.
        images: Number of images.
    """

    same: int
    images: int

    def require(self) -> None:
        """Refuse a module that is not what was trained.

        A value half-way between two integers goes either way in float32 arithmetic, and may tip an image between two classes
        that are as good. Of fewer than 1,000 images one may therefore be decided otherwise.

        Raises:
            BundleError: It decides otherwise on too many images.
        """
        if self.images - self.same > max(1, int((1 - LEAST_AGREEMENT) * self.images + 1e-6)):
            raise BundleError(
                f"the compiled module decides as the trained network on {self.same} of {self.images} images, and "
                f"{LEAST_AGREEMENT:.1%} are needed: nothing is written. Give a smaller --rate, or a higher precision to the "
                "layers that `diagnose` names"
            )


@dataclass(frozen=True, eq=False)
class Finetuned:
    """A configuration after fine-tuning.

    Attributes:
        config: The configuration.
        program: The integer program with what was trained.
        measurement: Its module, measured as a trial.
        heldout: The same on held-out images.
        agreement: Of the module with the network that was trained.
        epochs: What training showed.
        training_images: Images trained on.
    """

    config: QuantConfig
    program: Program
    measurement: Measurement
    heldout: Heldout
    agreement: Agreement
    epochs: tuple[Epoch, ...]
    training_images: int


def open_images(
    evaluator: ModelEvaluator, folder: Path | None, limit: int | None, seed: int, progress: Callable[[str], None]
) -> TrainingImages:
    """The images to fine-tune a model on.

    Args:
        evaluator: The model and the images that judge it.
        folder: A directory of labelled images; None for what the built-in model was trained on.
        limit: Images to use at most; None for all.
        seed: Of the choice of images.
        progress: Called with what is to be known of them.

    Raises:
        UsageError: The model is a detector, or brings no training images and none are given.
        DataError: The images cannot be used.
    """
    if evaluator.head is not None:
        raise UsageError(f"fine-tuning trains classifiers, and model {evaluator.settings.model!r} is a detector")
    if folder is None and evaluator.settings.model != "demo":
        raise UsageError(
            f"model {evaluator.settings.model!r} brings no images to train on: give a directory of labelled images with --train"
        )
    judged = Judged.of(evaluator.dataset, lambda: [evaluator.images("search"), evaluator.images("heldout")])
    if folder is None:
        return builtin_images(evaluator.dataset, judged, limit, seed, progress)
    return directory_images(folder, evaluator.dataset, judged, limit, seed, progress)


def checkpoint_folder(plan: QatPlan, images: TrainingImages, settings: TrainSettings, path: Path | None) -> CheckpointFolder:
    """The folder of a training's checkpoints, by default one that its whole identity names.

    Args:
        plan: What is trained.
        images: On what.
        settings: How.
        path: The user's choice; None for the default.
    """
    ranges = json.dumps([plan.ranges, {name: float(step) for name, step in plan.steps.items()}], sort_keys=True)
    identity = {
        "model": plan.model.fingerprint,
        "configuration": plan.config.content_hash(),
        "calibration": hashlib.sha256(ranges.encode()).hexdigest(),
        "training images": images.fingerprint,
        **{name: f"{value:g}" for name, value in asdict(settings).items()},
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return CheckpointFolder(path or CHECKPOINTS / digest[:16], identity)


def finetune(
    evaluator: ModelEvaluator,
    config: QuantConfig,
    images: TrainingImages,
    settings: TrainSettings,
    path: Path | None,
    progress: Callable[[str], None],
) -> Finetuned:
    """Fine-tune a configuration, from its last checkpoint on, then lower, compile and measure it.

    Args:
        evaluator: The model, the images that judge it, the target.
        config: The configuration.
        images: What to train on.
        settings: How to train.
        path: Folder of the checkpoints; None for one named after all that the training depends on.
        progress: Called with what is to be known, line by line.

    Raises:
        SpaceError: The configuration cannot be fine-tuned.
        TrialError: Training goes astray, or the result cannot be built or measured.
        DataError: A training image cannot be used.
        StudyError: Checkpoints cannot be read or written, or are of another training.
    """
    variant = evaluator.variants(config)
    plan = plan_finetuning(variant.model, config, evaluator.ranges(config), variant.weights)
    network, folder = FakeQuantizedNetwork(plan), checkpoint_folder(plan, images, settings, path)
    with folder.taken():
        progress(f"fine-tuning on {len(images.training)} images, checkpoints in {folder.path}")
        epochs = train(network, images, settings, folder, progress, _teacher(evaluator))
    program = network.tuned().lower()
    progress("compiling and measuring what was trained")
    prepared = evaluator.prepare_program(program)
    measurement = evaluator.measurer.measure(prepared)
    (verdict,) = evaluator.measure_modules_again([prepared])
    parts = ("search", "heldout")
    with threads_for(network, AGREEMENT_BATCH):
        same = sum(_agreeing(network, evaluator.images(part), evaluator.logits(prepared, part)) for part in parts)
    agreement = Agreement(same, sum(len(evaluator.images(part)) for part in parts))
    return Finetuned(config, program, measurement, Heldout(*verdict), agreement, epochs, len(images.training))


def _teacher(evaluator: ModelEvaluator) -> Teacher | None:
    """The compiled float module, which takes a fraction of torch's time, a virtual machine for each thread that asks it.

    None where it runs on a GPU, or on several threads: those of the trainer keep all processors busy.
    """
    target = evaluator.run_target
    if target.device != "cpu" or target.threads != 1:
        return None
    module, own = evaluator.compile(QuantConfig(default_precision="fp32")), threading.local()

    def logits(inputs: Tensor) -> Tensor:
        if not hasattr(own, "machine"):
            own.machine = module.open()
        return torch.from_numpy(run_batches(own.machine, inputs.numpy(), evaluator.batch))

    return logits


@torch.no_grad()
def _agreeing(network: FakeQuantizedNetwork, images: np.ndarray, logits: np.ndarray) -> int:
    """Number of images on which the network's best class is the module's."""
    starts = range(0, len(images), AGREEMENT_BATCH)
    parts = (torch.tensor(images[start : start + AGREEMENT_BATCH]) for start in starts)
    found = np.concatenate([network(part).argmax(1).numpy() for part in parts])
    return int((found == logits.argmax(1)).sum())
