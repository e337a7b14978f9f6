"""How many CPUs and workers a process may use."""

import os

import pytest

from mdl_toolkit.utils import machine
from mdl_toolkit.utils.machine import available_cpus, default_workers


@pytest.mark.parametrize(
    ("cpus", "limits", "available", "workers"),
    [
        (1, {}, 1, 1),
        (2, {}, 2, 1),
        (3, {}, 3, 1),
        (8, {}, 8, 4),
        (64, {}, 64, 32),
        (200, {}, 200, 32),
        (64, {"cpu.max": "max 100000\n"}, 64, 32),
        (64, {"cpu.max": "800000 100000\n"}, 8, 4),
        (4, {"cpu.max": "800000 100000\n"}, 4, 2),
        (64, {"cpu.max": "150000 100000\n"}, 1, 1),
        (64, {"cpu.max": "50000 100000\n"}, 1, 1),
        (64, {"cpu.max": "nonsense\n"}, 64, 32),
        (64, {"of/mine/cpu.max": "400000 100000\n", "cpu.max": "max 100000\n"}, 4, 2),
        (64, {"of/mine/cpu.max": "max 100000\n", "of/cpu.max": "400000 100000\n"}, 4, 2),
        (64, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64, 32),
        (64, {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4, 2),
        (64, {"cpu/of/cpu.cfs_quota_us": "400000\n", "cpu/of/cpu.cfs_period_us": "100000\n"}, 4, 2),
    ],
)
def test_default_workers(tmp_path, monkeypatch, cpus, limits, available, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,cpuacct:/of/mine\n0::/of/mine\n")
    for name, text in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_cpus() == available
    assert default_workers() == workers


def test_this_machine():
    assert 1 <= available_cpus() <= (os.cpu_count() or 1)
    assert 1 <= default_workers() <= 32
