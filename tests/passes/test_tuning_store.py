"""tuning_store: what is written is read, damage is named, and many writers lose nothing."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pvae.passes import tuning_store
from pvae.passes.compute_device import ComputeDevice, Libraries
from pvae.passes.conv_problem import ConvProblem
from pvae.passes.tuning_store import DeviceTable, Measured, TuningStoreError, merge, read, shipped, store_path

DEVICE = ComputeDevice("cuda", "NVIDIA H200", "9.0", 132, 4e12, Libraries("2.13.0", "3.7.1", "91900"))


def problem(channels: int) -> ConvProblem:
    return ConvProblem.parse(f"bfloat16 1x{channels}x4x8x8 > {channels} kernel 3x3x3 padding 1.1x1.1x1.1")


def table(device: ComputeDevice = DEVICE, **forms: Measured) -> DeviceTable:
    return DeviceTable.of(device, 4e12, {problem(96): forms})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "store.json"
    assert read(path) == {}
    new = table(
        native=Measured(1.5), taps=Measured(0.5, None, (16, 16, 64, 32, 32, 4, 4)), unfold2d=Measured(None, "no")
    )
    merge(path, new)
    assert read(path) == {new.key: new}
    assert new.key == "NVIDIA H200, 9.0, torch 2.13.0, triton 3.7.1, cudnn 91900"
    assert {p.name for p in path.parent.iterdir()} == {"store.json", "store.json.lock"}


@given(st.dictionaries(st.sampled_from(["native", "channels_last", "taps"]), st.floats(1e-6, 1e6)))
def test_property_figures_survive(tmp_path_factory: pytest.TempPathFactory, times: dict[str, float]) -> None:
    path = tmp_path_factory.mktemp("store") / "store.json"
    new = table(**{name: Measured(ms) for name, ms in times.items()})
    merge(path, new)
    assert read(path)[new.key] == new


def test_merging_replaces_the_same_convolution_and_keeps_others(tmp_path: Path) -> None:
    path = tmp_path / "store.json"
    other = ComputeDevice("cpu", "a CPU", libraries=Libraries("2.13.0"))
    merge(path, table(native=Measured(1.0), taps=Measured(2.0)))
    merge(path, DeviceTable.of(DEVICE, 4e12, {problem(64): {"native": Measured(3.0)}}))
    merge(path, table(other, native=Measured(9.0)))
    merge(path, table(native=Measured(1.1)))
    found = read(path)
    assert found[DEVICE.key].convolutions == {
        problem(96): {"native": Measured(1.1)},
        problem(64): {"native": Measured(3.0)},
    }
    assert found[other.key].convolutions == {problem(96): {"native": Measured(9.0)}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Expecting value"),
        ("{", "Expecting"),
        ("[]", "list indices"),
        ('{"devices": {}}', "it lacks 'format'"),
        ('{"format": 2, "devices": {}}', "it is of format 2, this pvae reads 1"),
        ('{"format": 1, "devices": {"d": {"name": "d"}}}', "it lacks 'convolutions'"),
        ('{"format": 1, "devices": {"d": {"convolutions": {"conv": {}}}}}', "'conv' is no convolution"),
    ],
)
def test_damage_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "store.json"
    path.write_text(text)
    for use in (lambda: read(path), lambda: merge(path, table(native=Measured(1.0)))):
        with pytest.raises(TuningStoreError) as raised:
            use()
        assert str(path) in str(raised.value) and says in str(raised.value) and "delete it" in str(raised.value)
    assert path.read_text() == text, "nobody's file is overwritten"


@pytest.mark.parametrize("ms", [0, -1, "1", float("inf"), float("nan"), None])
def test_times_are_positive_numbers(tmp_path: Path, ms: object) -> None:
    path = tmp_path / "store.json"
    merge(path, table(native=Measured(1.25)))
    path.write_text(path.read_text().replace("1.25", json.dumps(ms)))
    with pytest.raises(TuningStoreError, match="is no positive number"):
        read(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TuningStoreError, match="cannot be read: Is a directory"):
        read(tmp_path)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "store.json"
    for ms in (1.0, 2.0):
        merge(path, table(native=Measured(ms)))
        assert read(path)[DEVICE.key].convolutions[problem(96)]["native"].ms == ms


def write_one(path: Path, channels: int) -> None:
    merge(path, DeviceTable.of(DEVICE, 4e12, {problem(channels): {"native": Measured(float(channels))}}))
    assert problem(channels) in read(path)[DEVICE.key].convolutions


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "store.json"
    processes = [multiprocessing.get_context("fork").Process(target=write_one, args=(path, c)) for c in range(8, 24)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0] * len(processes)
    assert {p.channels for p in read(path)[DEVICE.key].convolutions} == set(range(8, 24))
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".new"] == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store.json"
    merge(path, table(native=Measured(1.0)))
    before = path.read_text()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(tuning_store.os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        merge(path, table(native=Measured(2.0)))
    assert path.read_text() == before and {p.name for p in tmp_path.iterdir()} == {"store.json", "store.json.lock"}


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert store_path("") == Path("/cache/pvae/tuning.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store_path("") == Path.home() / ".cache/pvae/tuning.json"
    assert store_path("~/mine.json") == Path.home() / "mine.json" and store_path("off") is None


def test_the_tables_that_pvae_brings() -> None:
    assert {t.name for t in shipped()} >= {"NVIDIA H200"}
    assert all(t.copy > 0 and t.convolutions for t in shipped())


def test_devices_have_keys_of_their_own() -> None:
    here = ComputeDevice.of(torch.device("cpu"), None)
    assert here.kind == "cpu" and here.key.endswith(f"torch {torch.__version__}")
    assert ComputeDevice.of(torch.device("meta"), None).key == "meta"
