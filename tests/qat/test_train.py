"""Training: it learns, it goes on where it was killed, it says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import network, ranges_of
from qat_images import training_images
from safetensors.torch import load_file

from qsearch.config import QuantConfig
from qsearch.errors import QuantizeError, StudyError, StudyMismatchError
from qsearch.models.interpret import interpret
from qsearch.qat.checkpoint import CheckpointFolder, Epoch
from qsearch.qat.finetune import checkpoint_folder
from qsearch.qat.network import FakeQuantizedNetwork
from qsearch.qat.plan import QatPlan, plan_finetuning
from qsearch.qat.train import TrainSettings, train
from qsearch.quantize.weight_store import WeightStore

SETTINGS = TrainSettings(epochs=3, batch=8, rate=1e-2)
IMAGES = training_images(7)


@pytest.fixture(scope="module")
def plan() -> QatPlan:
    config = QuantConfig(default_precision="w4a8")
    model = network("residual")[0]
    return plan_finetuning(model, config, ranges_of(model, config), WeightStore())


def trained(
    plan: QatPlan, folder: Path, settings: TrainSettings = SETTINGS, say: Callable[[str], None] = str
) -> tuple[FakeQuantizedNetwork, tuple[Epoch, ...]]:
    one = FakeQuantizedNetwork(plan)
    return one, train(one, IMAGES, settings, checkpoint_folder(plan, IMAGES, settings, folder), say_with(folder, say))


def say_with(folder: Path, say: Callable[[str], None]) -> Callable[[str], None]:
    folder.mkdir(exist_ok=True)
    return say


def test_training_lowers_the_loss_and_changes_everything(plan: QatPlan, tmp_path: Path) -> None:
    said: list[str] = []
    one, epochs = trained(plan, tmp_path, replace(SETTINGS, epochs=6), said.append)
    assert epochs[0].loss is None and len(epochs) == 7
    losses = [epoch.loss for epoch in epochs[1:]]
    assert losses[-1] < losses[0]
    start = FakeQuantizedNetwork(plan).state()
    same = [name for name, value in one.state().items() if torch.equal(value, start[name])]
    assert not same
    assert said[0].startswith("before training: validation top-1") and "epoch 6 of 6: loss" in said[-1]


def test_a_teacher_stands_in_for_the_float_network(plan: QatPlan, tmp_path: Path) -> None:
    expected, _ = trained(plan, tmp_path / "torch")
    asked: list[int] = []

    def taught(name: str, factor: float) -> dict[str, torch.Tensor]:
        def teacher(inputs: torch.Tensor) -> torch.Tensor:
            asked.append(len(inputs))
            return factor * interpret(plan.model, inputs)

        one, folder = FakeQuantizedNetwork(plan), tmp_path / name
        folder.mkdir()
        train(one, IMAGES, SETTINGS, checkpoint_folder(plan, IMAGES, SETTINGS, folder), str, teacher)
        return one.state()

    steps = SETTINGS.epochs * (len(IMAGES.training) // SETTINGS.batch)
    same, other = taught("same", 1.0), taught("other", 0.0)
    assert sum(asked) == 2 * steps * SETTINGS.batch
    assert all(torch.equal(value, same[name]) for name, value in expected.state().items())
    assert any(not torch.equal(value, other[name]) for name, value in same.items())


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("after", [1, 2])
def test_a_killed_training_goes_on_as_if_it_had_not_been(plan: QatPlan, tmp_path: Path, after: int) -> None:
    whole, epochs = trained(plan, tmp_path / "whole")
    said: list[str] = []

    def kill(line: str) -> None:
        if line.startswith(f"epoch {after} of 3: loss"):
            raise _KilledError

    with pytest.raises(_KilledError):
        trained(plan, tmp_path / "killed", say=kill)
    again, seen = trained(plan, tmp_path / "killed", say=said.append)
    assert said[0] == f"going on after epoch {after} of 3"
    assert all(torch.equal(value, again.state()[name]) for name, value in whole.state().items())
    assert [(one.loss, one.validation_top1) for one in seen] == [(one.loss, one.validation_top1) for one in epochs]
    said.clear()
    third, _ = trained(plan, tmp_path / "killed", say=said.append)
    assert said == ["going on after epoch 3 of 3"]
    assert all(torch.equal(value, third.state()[name]) for name, value in whole.state().items())


def test_a_kill_between_the_two_files_leaves_the_checkpoint_before(plan: QatPlan, tmp_path: Path) -> None:
    trained(plan, tmp_path, replace(SETTINGS, epochs=1))
    folder = checkpoint_folder(plan, IMAGES, replace(SETTINGS, epochs=1), tmp_path)
    before = folder.load()
    (tmp_path / "epoch-2.safetensors").write_bytes(b"whole, but the table does not know it yet")
    (tmp_path / ".checkpoint.json.999999999-dead").write_bytes(b"half")
    after = folder.load()
    assert before is not None and after is not None and after.epochs == before.epochs
    folder.save(replace(after, epochs=(*after.epochs, after.epochs[-1], after.epochs[-1])))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.json", "epoch-3.safetensors"]


def test_the_checkpoint_is_of_plain_files(plan: QatPlan, tmp_path: Path) -> None:
    trained(plan, tmp_path, replace(SETTINGS, epochs=1))
    document = json.loads((tmp_path / "checkpoint.json").read_text())
    assert document["tensors"] == "epoch-1.safetensors" and len(document["epochs"]) == 2
    tensors = load_file(tmp_path / document["tensors"])
    assert set(FakeQuantizedNetwork(plan).trained) <= set(tensors)


def test_another_training_is_refused(plan: QatPlan, tmp_path: Path) -> None:
    trained(plan, tmp_path)
    with pytest.raises(StudyMismatchError, match="epochs was 3, is 4; rate was 0.01, is 0.1. Give another --checkpoint"):
        trained(plan, tmp_path, replace(SETTINGS, epochs=4, rate=0.1))
    config = QuantConfig(default_precision="w4a8", granularity="layer_wise")
    other = plan_finetuning(plan.model, config, plan.ranges, WeightStore())
    with pytest.raises(StudyMismatchError, match="configuration was"):
        trained(other, tmp_path)
    trained(plan, tmp_path)


def test_a_damaged_checkpoint(plan: QatPlan, tmp_path: Path) -> None:
    trained(plan, tmp_path)
    file = tmp_path / "epoch-3.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StudyError, match="is damaged.*remove that folder"):
        trained(plan, tmp_path)
    (tmp_path / "checkpoint.json").write_text("{")
    with pytest.raises(StudyError, match="is damaged"):
        trained(plan, tmp_path)


def test_two_processes_do_not_share_a_folder(plan: QatPlan, tmp_path: Path) -> None:
    one, other = (CheckpointFolder(tmp_path / "a", {}) for _ in range(2))
    with one.taken(), pytest.raises(StudyError, match="another process is training"), other.taken():
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="not a directory"), CheckpointFolder(tmp_path / "file", {}).taken():
        pass


def test_a_rate_that_is_too_large_is_named(plan: QatPlan, tmp_path: Path) -> None:
    config = QuantConfig(default_precision="fp32", precision={"head": "int8"})
    mostly_float = plan_finetuning(plan.model, config, plan.ranges, WeightStore())
    with pytest.raises(QuantizeError, match="went astray in epoch 1.*Give a smaller --rate than 1e\\+30"):
        trained(mostly_float, tmp_path, replace(SETTINGS, rate=1e30))


def test_fewer_images_than_a_batch(plan: QatPlan, tmp_path: Path) -> None:
    _, epochs = trained(plan, tmp_path, TrainSettings(epochs=1, batch=1000))
    assert len(epochs) == 2 and epochs[1].loss is not None
