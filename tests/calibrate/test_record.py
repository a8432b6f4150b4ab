"""The record on disk, and the pass that makes it."""

import json
from pathlib import Path

import numpy as np
import pytest

from qsearch.calibrate.observe import observe
from qsearch.calibrate.record import StatisticsRecord, load_record, save_record
from qsearch.errors import CalibrationError, DataError
from qsearch.models.graph import Conv, Graph, Model, Node, Parameters


def network(weight: float = 1.0) -> Model:
    nodes = (
        Node("input", "input", (), (1, 2, 4, 4)),
        Node("conv", "conv2d", ("input",), (1, 3, 4, 4), Conv()),
        Node("root", "activation", ("conv",), (1, 3, 4, 4), activation="sigmoid"),
    )
    weights = {"conv": np.full((3, 2, 1, 1), weight, np.float32)}
    return Model("tiny", Graph(nodes, "root"), Parameters(weights, {"conv": np.zeros(3, np.float32)}))


def images(count: int = 5) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 2, 4, 4)).astype(np.float32)


@pytest.fixture
def record() -> StatisticsRecord:
    return observe(network(), images(), batch_size=2)


def test_observation_covers_every_node_and_image() -> None:
    calls: list[tuple[int, int]] = []
    data = images()
    record = observe(network(), data, 2, lambda done, total: calls.append((done, total)))
    # A batch ends at the half.
    assert calls == [(2, 5), (3, 5), (5, 5)]
    assert record.images == 5
    assert {name: tensor.count for name, tensor in record.tensors.items()} == {"input": 160, "conv": 240, "root": 240}
    assert record.model_fingerprint == network().fingerprint
    np.testing.assert_array_equal(record.tensors["input"].channel_maximum, data.max((0, 2, 3)))
    assert record.tensors["conv"].maximum == pytest.approx(data.sum(1).max(), rel=1e-6)


def test_batch_size_does_not_matter(record: StatisticsRecord) -> None:
    assert observe(network(), images(), batch_size=5).tensors["input"].histogram.counts.tolist() == (
        record.tensors["input"].histogram.counts.tolist()
    )


def test_a_record_survives_the_disk(record: StatisticsRecord, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "statistics.npz"
    save_record(record, path)
    loaded = load_record(path)
    assert loaded.content_hash == record.content_hash
    assert list(loaded.tensors) == ["input", "conv", "root"]
    assert (loaded.images, loaded.model_fingerprint) == (5, record.model_fingerprint)
    assert loaded.tensors["conv"].histogram.exponent == record.tensors["conv"].histogram.exponent
    np.testing.assert_array_equal(loaded.tensors["conv"].channel_minimum, record.tensors["conv"].channel_minimum)
    assert [entry.name for entry in path.parent.iterdir()] == ["statistics.npz"]


def test_the_hash_tells_records_apart(record: StatisticsRecord) -> None:
    assert observe(network(), images(), 2).content_hash == record.content_hash
    assert observe(network(), images(4), 2).content_hash != record.content_hash
    assert observe(network(2.0), images(), 2).content_hash != record.content_hash


def change_header(path: Path, **changes: object) -> None:
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["header"] = np.array(json.dumps({**json.loads(str(arrays["header"])), **changes}))
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def test_another_version_is_refused(record: StatisticsRecord, tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    save_record(record, path)
    change_header(path, version=99)
    with pytest.raises(CalibrationError, match="has version 99, this qsearch reads version 3"):
        load_record(path)


def test_a_changed_record_is_refused(record: StatisticsRecord, tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    save_record(record, path)
    change_header(path, images=6)
    with pytest.raises(CalibrationError, match="damaged"):
        load_record(path)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04" + bytes(40)])
def test_another_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match="not a statistics record"):
        load_record(path)


def test_every_flipped_byte_is_noticed_or_harmless(record: StatisticsRecord, tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    save_record(record, path)
    content = path.read_bytes()
    for position in np.linspace(0, len(content) - 1, 60).astype(int):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        try:
            loaded = load_record(path)
        except CalibrationError:
            continue
        assert loaded.content_hash == record.content_hash


def test_a_missing_or_unwritable_file_is_named(record: StatisticsRecord, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"missing\.npz"):
        load_record(tmp_path / "missing.npz")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CalibrationError, match="cannot write"):
        save_record(record, tmp_path / "folder")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_failed_write_keeps_the_old_record(record: StatisticsRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "statistics.npz"
    save_record(record, path)

    def full(*args: object, **arrays: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(CalibrationError, match="No space left on device"):
        save_record(observe(network(), images(3), 2), path)
    assert load_record(path).content_hash == record.content_hash
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("shape", [(0, 2, 4, 4), (5, 3, 4, 4), (5, 2, 4)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"\(N, 2, 4, 4\)"):
        observe(network(), np.zeros(shape, np.float32), 2)


def test_values_that_are_not_finite_are_located() -> None:
    broken = images()
    broken[3, 0, 0, 0] = np.nan
    with pytest.raises(CalibrationError, match="preprocessed images hold NaN"):
        observe(network(), broken, 2)
    with pytest.raises(CalibrationError, match="layer 'conv' has NaN or infinity in its weights"):
        observe(network(np.nan), images(), 2)
    with pytest.raises(CalibrationError, match="infinity at node 'conv'"):
        observe(network(3e38), np.full((1, 2, 4, 4), 2.0, np.float32), 2)
