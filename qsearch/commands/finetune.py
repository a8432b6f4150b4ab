"""`finetune`: train a configuration through its rounding, and bundle what comes of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qsearch.commands.options import ConvertChannels, Data, Json, Model, Preprocessing, Seed, Storage, Target, Threads, Weights
from qsearch.commands.subject import ModelOptions, Subject, chosen_subject
from qsearch.commands.terminal import print_json, print_table, say, stdout_reserved

if TYPE_CHECKING:
    from qsearch.qat.finetune import Finetuned
    from qsearch.search.evaluation.model_evaluator import ModelEvaluator
    from qsearch.search.front import FrontPoint

__all__ = ["finetune"]


def finetune(
    study: Annotated[
        str | None, typer.Option(help="Study that holds the trial; model, images and target are the study's.")
    ] = None,
    trial: Annotated[int | None, typer.Option(min=0, help="Number of the trial.", show_default="the front's knee")] = None,
    config: Annotated[
        str | None, typer.Option(help="Configuration: a JSON file, or a precision for every layer such as w4a8.")
    ] = None,
    model: Model = "demo",
    weights: Weights = None,
    data: Data = None,
    train: Annotated[
        Path | None,
        typer.Option(
            help="Directory of labelled images to train on, laid out as for --data.", show_default="what demo was trained on"
        ),
    ] = None,
    images: Annotated[int | None, typer.Option(min=10, help="Training images to use at most.", show_default="all")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 3,
    train_batch: Annotated[int, typer.Option(min=1, help="Images of one training step.")] = 64,
    rate: Annotated[float, typer.Option(min=0.0, help="Learning rate at the start; it falls to zero along a cosine.")] = 2e-3,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of the checkpoints.", show_default="one under studies/finetune/")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to write a bundle to.")] = None,
    target: Target = "llvm",
    threads: Threads = 1,
    seed: Seed = 0,
    preprocessing: Preprocessing = None,
    convert_channels: ConvertChannels = False,
    storage: Storage = None,
    json: Json = False,
) -> None:
    """Fine-tune a configuration with its rounding in place; the same command again goes on after the last whole epoch.

    Weights, biases and steps are learned, the module is compiled and measured as a trial, search and held-out images are
    never trained on.
    """
    from qsearch.export.bundle import require_vacant
    from qsearch.qat.train import TrainSettings

    options = ModelOptions(model, weights, data, target, threads, seed, preprocessing, convert_channels)
    subject = chosen_subject(study, trial, storage, config, options)
    if out is not None:
        # Said before hours of training.
        require_vacant(out)
    settings = TrainSettings(epochs, train_batch, rate, subject.settings.seed)
    with stdout_reserved():
        from qsearch.export.from_study import check_identity
        from qsearch.qat.finetune import finetune as tune
        from qsearch.qat.finetune import open_images
        from qsearch.qat.plan import require_trainable
        from qsearch.report.tables import finetune_table
        from qsearch.search.evaluation.objective import open_evaluator
        from qsearch.search.front import FrontPoint

        evaluator = open_evaluator(subject.settings, say, {subject.title: subject.config})
        if subject.study is not None:
            check_identity(subject.study, subject.parts, evaluator.identity)
        require_trainable(subject.config, evaluator.graph)
        chosen = open_images(evaluator, train, images, subject.settings.seed, say)
        before = _measured(evaluator, subject)
        tuned = tune(evaluator, subject.config, chosen, settings, checkpoint, say)
        after = FrontPoint(before.trial, subject.config, tuned.measurement, tuned.heldout)
        facts = _facts(subject, tuned, before)
        if tuned.epochs[-1].validation_top1 < tuned.epochs[0].validation_top1:
            say("training has lowered validation top-1: give more images with --train, or a smaller --rate")
        say(f"the module decides as the trained network on {tuned.agreement.same} of {tuned.agreement.images} images")
        if out is not None:
            _write(evaluator, tuned, after, facts, out)
    if json:
        print_json(_document(evaluator, subject, before, after, facts, out))
        return
    print_table(finetune_table(before, after, evaluator.baseline, f"{subject.title}, fine-tuned for {epochs} epochs"))


def _measured(evaluator: ModelEvaluator, subject: Subject) -> FrontPoint:
    """The configuration without training, measured now, beside what comes of it."""
    from qsearch.search.front import FLOAT_TRIAL, FrontPoint, Heldout

    say(f"measuring {subject.title} without training")
    measurement = evaluator.evaluate(subject.config)
    (verdict,) = evaluator.measure_again([subject.config])
    number = FLOAT_TRIAL if subject.trial is None else subject.trial
    return FrontPoint(number, subject.config, measurement, Heldout(*verdict))


def _facts(subject: Subject, tuned: Finetuned, before: FrontPoint) -> dict[str, Any]:
    """What a bundle's metrics say of the training."""
    assert before.heldout is not None
    untrained = {
        "top1_loss_pp": before.measurement.accuracy.top1_loss_pp,
        "heldout_top1_loss_pp": before.heldout.accuracy.top1_loss_pp,
    }
    epochs = [asdict(epoch) for epoch in tuned.epochs]
    return {
        "remark": f"fine-tuned from {subject.title}: config.json alone does not give this module",
        "finetuning": {
            "training_images": tuned.training_images,
            "epochs": epochs,
            "processor_seconds": sum(epoch.processor_seconds for epoch in tuned.epochs),
            "agreement": {"same": tuned.agreement.same, "images": tuned.agreement.images},
            "untrained": untrained,
        },
    }


def _write(evaluator: ModelEvaluator, tuned: Finetuned, after: FrontPoint, facts: dict[str, Any], out: Path) -> None:
    from qsearch.export.from_study import export_program

    tuned.agreement.require()
    size = export_program(evaluator, tuned.program, after, out, facts)
    say(f"fine-tuned module -> {out} ({size:,} bytes)")


def _document(
    evaluator: ModelEvaluator, subject: Subject, before: FrontPoint, after: FrontPoint, facts: dict[str, Any], out: Path | None
) -> dict[str, Any]:
    from qsearch.report.documents import baseline_document, point_document

    found = {"untrained": point_document(before), "finetuned": point_document(after)}
    for point in found.values():
        point["trial"] = subject.trial
    return {
        "model": subject.settings.model,
        "study": subject.study,
        "trial": subject.trial,
        "target": evaluator.target.description,
        "baseline": baseline_document(evaluator.baseline),
        **found,
        "finetuning": facts["finetuning"],
        "bundle": None if out is None else str(out),
    }
