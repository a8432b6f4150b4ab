"""The networks that the accuracy bench trains: found by name, of the built-in data's shape, trained once."""

from pathlib import Path

import fashion_networks
import pytest
import torch
from safetensors.torch import load_file

from qsearch.errors import DataError
from qsearch.models.zoo import load_model


@pytest.mark.parametrize("name", fashion_networks.RECIPES)
def test_the_networks_are_found_and_read_the_built_in_images(name: str) -> None:
    loaded = load_model(f"fashion_networks:{name}")
    assert loaded.classes == fashion_networks.CLASSES and loaded.preprocessing.shape == (1, 28, 28)
    with torch.no_grad():
        assert loaded.module(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_training_needs_its_images_and_happens_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="train-images"):
        fashion_networks.trained("resnet18", tmp_path, tmp_path)
    calls: list[Path] = []
    monkeypatch.setattr(fashion_networks, "train", lambda name, out, images: (calls.append(out), out.touch()))
    weights = [fashion_networks.trained("mobilenet_v2", tmp_path) for _ in range(2)]
    assert weights[0] == weights[1] == calls[0] and len(calls) == 1


def test_weights_are_those_of_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels, labels = torch.randint(0, 256, (256, 28, 28), generator=generator), torch.arange(256) % 10
    read = pixels.to(torch.uint8).numpy(), labels.numpy()
    monkeypatch.setattr(fashion_networks, "read_images_and_labels", lambda folder, part: read)
    monkeypatch.setitem(fashion_networks.RECIPES, "mobilenet_v2", (128, 1))
    fashion_networks.train("mobilenet_v2", tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors").keys() == fashion_networks.mobilenet_v2().state_dict().keys()
