"""`finetune`: what it measures and writes, that it goes on after a kill, and what it refuses."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lossy_networks
import pytest
from lossy_networks import write_labelled
from qat_images import write_training
from real_search import completed, fails, start, within

from qsearch.errors import BundleError
from qsearch.qat.finetune import Agreement

LOSSY = {"default_precision": "w4a8", "granularity": "layer_wise"}
MODEL = ("finetune", "--model", "lossy_networks:Plain", "--data", "data", "--train", "train", "--config", "config.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that loses much at 4 bits with one scale per layer, its images, and images to train on."""
    root = tmp_path_factory.mktemp("finetune")
    write_labelled(root / "data", lossy_networks.Plain())
    write_training(root / "train", lossy_networks.Plain(), 800)
    (root / "config.json").write_text(json.dumps(LOSSY))
    return root


def tuned(folder: Path, *options: str) -> dict[str, Any]:
    result = within(folder, *MODEL, *options, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_what_was_lost_comes_back_and_can_be_deployed(folder: Path) -> None:
    found = tuned(folder, "--out", "bundle", "--epochs", "5", "--train-batch", "16", "--rate", "1e-2")
    before, after = found["untrained"], found["finetuned"]
    lost = [one["top1_loss_pp"] + one["heldout"]["top1_loss_pp"] for one in (before, after)]
    assert before["top1_loss_pp"] > 15 and lost[1] < 0.85 * lost[0]
    assert after["peak_bytes"] == before["peak_bytes"] and after["config"] == before["config"]
    agreement = found["finetuning"]["agreement"]
    assert agreement["images"] == 216 and agreement["same"] >= 215
    epochs = found["finetuning"]["epochs"]
    assert len(epochs) == 6 and epochs[0]["loss"] is None and epochs[-1]["loss"] < epochs[1]["loss"]
    verified = within(folder, "verify", "bundle", "--json")
    assert verified.returncode == 0, verified.stderr
    metrics = json.loads((folder / "bundle" / "metrics.json").read_text())
    assert metrics["search"]["accuracy"]["top1_loss_pp"] == after["top1_loss_pp"]
    assert metrics["heldout"]["top1_loss_pp"] == after["heldout"]["top1_loss_pp"]
    assert "fine-tuned from config.json" in metrics["remark"] and metrics["finetuning"]["training_images"] == 720


@pytest.mark.slow
def test_as_text_and_once_more_without_training(folder: Path) -> None:
    options = ("--epochs", "1", "--checkpoint", "kept")
    first = within(folder, *MODEL, *options)
    assert first.returncode == 0, first.stderr
    assert "not trained" in first.stdout and "fine-tuned" in first.stdout and "held-out pp" in first.stdout
    assert "epoch 1 of 1: loss" in first.stderr and "checkpoints in kept" in first.stderr
    again = within(folder, *MODEL, *options)
    assert "going on after epoch 1 of 1" in again.stderr and "epoch 1 of 1: loss" not in again.stderr
    fails(folder, 1, ("kept holds the checkpoint", "epochs was 1, is 2"), *MODEL, "--epochs", "2", "--checkpoint", "kept")


def test_a_trial_of_a_study(small: Path) -> None:
    write_training(small / "train", lossy_networks.Plain(), 30)
    labels = (small / "train" / "labels.csv").read_text().splitlines()
    # The network of that study knows two classes.
    rows = [f"{row.split(',')[0]},{int(row.split(',')[1]) % 2}" for row in labels[1:]]
    (small / "train" / "labels.csv").write_text("\n".join([labels[0], *rows]) + "\n")
    import optuna

    study = optuna.load_study(study_name="small", storage=f"sqlite:///{small}/studies/small.db")
    trials = {trial.number: trial for trial in study.get_trials()}
    number = next(n for n in completed(small, "small") if "int8" in trials[n].user_attrs["config"]["precision"].values())
    options = ("--study", "small", "--trial", str(number), "--train", "train", "--epochs", "1")
    result = within(small, "finetune", *options, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["study"] == "small" and found["trial"] == number and found["finetuned"]["trial"] == number
    assert found["untrained"]["top1_loss_pp"] == trials[number].user_attrs["measurement"]["accuracy"]["top1_loss_pp"]


def test_a_module_that_decides_otherwise_is_not_written() -> None:
    for same, images in ((9990, 10_000), (999, 1000), (215, 216)):
        Agreement(same, images).require()
    for same, images in ((9989, 10_000), (998, 1000), (214, 216)):
        with pytest.raises(BundleError, match=f"on {same} of {images} images, and 99.9%"):
            Agreement(same, images).require()


BAD = {
    "neither": (("--model", "demo"), 2, ("either --study",)),
    "no such study": (("--study", "nowhere"), 1, ("nowhere",)),
    "a model beside a study": (("--study", "x", "--model", "efficientnet_lite0"), 2, ("--model contradict --study",)),
    "no such configuration": (("--config", "nowhere.json"), 2, ("nowhere.json",)),
    "no training images": ((*MODEL[1:5], "--config", "config.json"), 2, ("brings no images to train on", "--train")),
    "nothing quantized": ((*MODEL[1:7], "--config", "fp32"), 2, ("nothing to fine-tune",)),
    "no such directory": ((*MODEL[1:5], "--config", "int8", "--train", "nowhere"), 2, ("nowhere does not exist",)),
    "a bundle's place": ((*MODEL[1:], "--out", "train"), 1, ("train exists",)),
}


@pytest.mark.parametrize("options, code, words", BAD.values(), ids=BAD.keys())
def test_refusals(folder: Path, options: tuple[str, ...], code: int, words: tuple[str, ...]) -> None:
    fails(folder, code, words, "finetune", *options)


def test_trials_that_do_not_exist(small: Path) -> None:
    fails(small, 1, ("no completed trial 999",), "finetune", "--study", "small", "--trial", "999")


def test_other_classes(folder: Path) -> None:
    write_training(folder / "strange", lossy_networks.Plain(), 20)
    table = folder / "strange" / "labels.csv"
    table.write_text(table.read_text().replace("000.png,", "000.png,9"))
    fails(folder, 2, ("label 9", "out of range", "0 to 3"), *MODEL[:5], "--config", "int8", "--train", "strange")


@pytest.mark.slow
def test_a_killed_command_goes_on(folder: Path) -> None:
    options = ("--epochs", "8", "--train-batch", "16")
    process = start(folder, *MODEL, *options, "--checkpoint", "killed")
    table = folder / "killed" / "checkpoint.json"
    while process.poll() is None and not table.exists():
        time.sleep(0.005)
    process.kill()
    _, words = process.communicate()
    assert process.returncode == -9, words
    done = len(json.loads(table.read_text())["epochs"]) - 1
    assert done < 8
    again = tuned(folder, *options, "--checkpoint", "killed")
    whole = tuned(folder, *options, "--checkpoint", "whole")
    for epoch in [*again["finetuning"]["epochs"], *whole["finetuning"]["epochs"]]:
        del epoch["processor_seconds"]
    assert again["finetuning"]["epochs"] == whole["finetuning"]["epochs"]
    assert again["finetuned"]["top1_loss_pp"] == whole["finetuned"]["top1_loss_pp"]


@pytest.mark.slow
def test_the_demo_gains_most_of_its_loss_back(tmp_path: Path) -> None:
    (tmp_path / "w4a8.json").write_text(json.dumps({"default_precision": "w4a8", "granularity": "layer_wise"}))
    result = within(tmp_path, "finetune", "--config", "w4a8.json", "--images", "8000", "--out", "bundle", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    before, after = found["untrained"]["heldout"]["top1_loss_pp"], found["finetuned"]["heldout"]["top1_loss_pp"]
    assert before > 20
    assert after < 0.2 * before
    assert found["finetuning"]["agreement"]["same"] >= 0.999 * found["finetuning"]["agreement"]["images"]


@pytest.mark.slow
def test_a_search_fine_tunes_the_points_that_lose_most(folder: Path) -> None:
    (folder / "space.yaml").write_text(
        "version: 1\nname: four\nprecisions: {default: [fp32, w4a8]}\ngranularities: [layer_wise]\n"
    )
    options = ("search", "--model", "lossy_networks:Plain", "--data", "data", "--space", "space.yaml", "--study", "tuned")
    options += ("--budget", "4", "--jobs", "1", "--sampler", "random")
    wish = ("--then-finetune", "1", "--train", "train", "--images", "300", "--json")
    result = within(folder, *options, *wish)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    points = {point["trial"]: point for point in document["front"]}
    (one,) = document["finetuned"]
    lost = {trial: point["heldout"]["top1_loss_pp"] for trial, point in points.items()}
    assert lost[one["trial"]] == max(lost.values()) > 0
    assert one["config"] == points[one["trial"]]["config"] and one["peak_bytes"] == points[one["trial"]]["peak_bytes"]
    assert one["heldout"]["top1_loss_pp"] < lost[one["trial"]]
    assert one["agreement"]["same"] >= one["agreement"]["images"] - 1 and one["training"]["training_images"] == 270
    again = within(folder, *options, *wish)
    assert json.loads(again.stdout)["finetuned"] == document["finetuned"] and "fine-tuning on" not in again.stderr
    shown = within(folder, "front", "--study", "tuned")
    assert f"{one['trial']} tuned" in shown.stdout
    chosen = ("--study", "tuned", "--trial", str(one["trial"]), "--train", "train", "--images", "300", "--out", "tuned-bundle")
    exported = within(folder, "finetune", *chosen, "--json")
    assert exported.returncode == 0, exported.stderr
    assert "going on after epoch 3 of 3" in exported.stderr
    assert json.loads(exported.stdout)["finetuned"]["top1_loss_pp"] == one["top1_loss_pp"]


def test_training_images_without_fine_tuning(folder: Path) -> None:
    fails(folder, 2, ("--then-finetune",), "search", "--train", "train")
