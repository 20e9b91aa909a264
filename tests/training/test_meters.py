"""What a training costs: counters of energy on made-up machines, and figures that survive an interruption."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsbs.files import device_name
from dsbs.progress import NoProgress
from dsbs.training import callbacks, cost
from dsbs.training.callbacks import MetricsLogger
from dsbs.training.cost import (
    Counter,
    Energy,
    energy,
    nvidia_counters,
    package_counters,
    peak_memory,
)


def zone(
    powercap: Path, folder: str, name: str, microjoules: int, most: int = 1_000_000_000
) -> Path:
    path = powercap / folder
    path.mkdir(parents=True)
    for file, content in (
        ("name", name),
        ("energy_uj", str(microjoules)),
        ("max_energy_range_uj", str(most)),
    ):
        (path / file).write_text(content + "\n", encoding="utf-8")
    return path


def test_packages_are_summed_and_their_parts_and_the_whole_platform_are_not(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 100)
    others = [
        zone(tmp_path, "intel-rapl:0:0", "core", 7),
        zone(tmp_path, "intel-rapl:2", "psys", 9),
    ]
    counted = Energy(package_counters(tmp_path), "cpu packages")
    assert counted.joules() == 0.0 and counted.of == "cpu packages"
    for path in (first, second, *others):
        (path / "energy_uj").write_text(str(int((path / "energy_uj").read_text()) + 2_500_000))
    assert counted.joules() == pytest.approx(5.0)


def test_a_counter_that_begins_anew_loses_nothing(tmp_path: Path) -> None:
    path = zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000, most=10_000_000) / "energy_uj"
    counted = Energy(package_counters(tmp_path), "cpu packages")
    path.write_text("2000000")
    assert counted.joules() == pytest.approx(3.0)
    path.write_text("1000000")
    assert counted.joules() == pytest.approx(12.0)


@pytest.mark.parametrize("harm", ["no folder", "no package", "one cannot be read", "no range"])
def test_where_the_machine_does_not_tell_nothing_is_made_up(tmp_path: Path, harm: str) -> None:
    if harm != "no folder":
        zone(tmp_path, "intel-rapl:0", "psys" if harm == "no package" else "package-0", 5)
    if harm == "one cannot be read":
        (zone(tmp_path, "intel-rapl:1", "package-1", 5) / "energy_uj").unlink()
    if harm == "no range":
        (tmp_path / "intel-rapl:0" / "max_energy_range_uj").unlink()
    counted = Energy(package_counters(tmp_path), "cpu packages")
    assert counted.joules() is None and counted.of is None


def test_a_counter_that_falls_silent_or_is_set_back_ends_the_count() -> None:
    for later in (None, 1):
        told: list[int | None] = [5, later, 9]
        counted = Energy([Counter(iter(told).__next__, per_joule=1.0)], "gpus")
        assert counted.joules() is None
        assert counted.joules() is None, "for good: what was missed is not known"


class FakeNvml(SimpleNamespace):
    class NVMLError(Exception):
        pass


def test_gpus_are_found_by_their_names_and_counted_in_millijoules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = {"GPU-a": 1000, "GPU-b": 500, "GPU-other": 10**9}
    fake = FakeNvml(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=str,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: counts[handle],
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    counted = Energy(nvidia_counters(["a", "GPU-b"]), "gpus")
    counts["GPU-a"] += 1500
    counts["GPU-b"] += 250
    assert counted.joules() == pytest.approx(1.75)


def test_a_gpu_that_does_not_count_and_a_missing_package_give_no_counter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(handle: str) -> int:
        raise FakeNvml.NVMLError("Not Supported")

    fake = FakeNvml(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=str,
        nvmlDeviceGetTotalEnergyConsumption=refuse,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert nvidia_counters(["a"]) == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvidia_counters(["a"]) == []


def test_one_machine_does_not_speak_for_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert energy().of is None


def test_the_device_has_a_name_and_the_process_a_size(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor : 0\nmodel name\t: An Example CPU @ 2.00GHz\nmodel name\t: another\n"
    )
    import torch

    if not torch.cuda.is_available():
        assert device_name(cpuinfo) == "An Example CPU @ 2.00GHz"
        assert device_name(tmp_path / "missing")
        before, of = peak_memory()
        assert of == "process"
        filled = bytearray(int(before * 1.1e6))
        assert peak_memory()[0] >= len(filled) / 1e6


def test_a_resumed_trainings_parts_add_up_and_one_unknown_part_makes_the_sum_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "POWERCAP", tmp_path)
    path = zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000) / "energy_uj"
    line = '{"step": 5, "elapsed_s": 40.0, "tokens": 900, "examples": 80, "energy_j": %s, "peak_memory_mb": 1e9}\n'
    lost = '{"step": 7, "elapsed_s": 60.0, "tokens": 1300, "examples": 99, "energy_j": 170.0, "peak_memory_mb": 2e9}\n'
    monkeypatch.setattr(
        callbacks, "energy", lambda: Energy(package_counters(cost.POWERCAP), "cpu packages")
    )
    for before, expected in (("100.5", 103.0), ("null", None)):
        metrics = tmp_path / "metrics.jsonl"
        metrics.write_text(line % before + lost, encoding="utf-8")
        path.write_text("1000000")
        follow = MetricsLogger(metrics, NoProgress(), 4, Path("checkpoint-5"))
        path.write_text("3500000")
        state = SimpleNamespace(
            log_history=[
                {"step": 5, "tokens": 900},
                {"step": 8, "tokens": 1450},
                {"train_runtime": 1.0},
            ]
        )
        figures = follow.cost(state)
        assert figures.energy_j == expected and figures.energy_of == (
            None if expected is None else "cpu packages"
        )
        assert figures.tokens == 1450 and figures.wall_s >= 40.0 and figures.peak_memory_mb == 1e9
        assert figures.tokens_per_s == pytest.approx(1450 / figures.wall_s, rel=0.02)
