"""The end of `search --then-finetune`: fine-tune the points of the front that have most to gain.

What trains is imported within the functions: it loads torch, and few searches wish for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from qsearch.errors import BundleError, SpaceError, TrialError
from qsearch.search.finetuned import FinetunedTrial, load_finetuned, record_finetuned, worth_finetuning
from qsearch.search.front import study_front
from qsearch.search.study import StudyHandle
from qsearch.session.search_request import FinetuneWish

if TYPE_CHECKING:
    from qsearch.qat.training_images import TrainingImages
    from qsearch.search.evaluation.objective import ModelEvaluator

__all__ = ["finetune_front", "wished_images"]


def wished_images(evaluator: ModelEvaluator, wish: FinetuneWish, seed: int, say: Callable[[str], None]) -> TrainingImages | None:
    """The images to train on, so that what is wrong with them is met before the trials; None where nothing is wished.

    Raises:
        UsageError: There are none, or they cannot be used.
    """
    if not wish.count:
        return None
    from qsearch.qat.finetune import open_images

    return open_images(evaluator, wish.train, wish.images, seed, say)


def finetune_front(
    handle: StudyHandle, evaluator: ModelEvaluator, images: TrainingImages, count: int, seed: int, say: Callable[[str], None]
) -> None:
    """Fine-tune the points that have most to gain, and keep what comes of it in the study.

    A point that cannot be fine-tuned is named and left.

    Args:
        handle: The study.
        evaluator: Its model, images and target.
        images: What to train on.
        count: How many points at most.
        seed: Of the training.
        say: Called with what is to be known.
    """
    from qsearch.qat.finetune import finetune
    from qsearch.qat.train import TrainSettings

    settings = TrainSettings(seed=seed)
    training = asdict(settings) | {"training_images": len(images.training), "fingerprint": images.fingerprint}
    with handle.guard():
        points, known = worth_finetuning(study_front(handle.study), count), load_finetuned(handle.study)
    if not points:
        say("no point of the front loses anything: nothing is fine-tuned")
    for point in points:
        if point.trial in known and known[point.trial].training == training:
            continue
        say(f"trial {point.trial} loses {point.verdict[2]:.2f} pp on held-out images")
        try:
            found = finetune(evaluator, point.config, images, settings, None, say)
            found.agreement.require()
        except (BundleError, SpaceError, TrialError) as error:
            say(f"trial {point.trial} is not fine-tuned: {error}")
            continue
        agreement = found.agreement.same, found.agreement.images
        with handle.guard():
            record_finetuned(handle.study, FinetunedTrial(point.trial, found.measurement, found.heldout, agreement, training))
