"""How many processors a process may use, by control groups that are files of the test."""

import os

import pytest
import torch

from nemotron3.runtime import processors as module
from nemotron3.runtime.processors import cpu_quota, fit_pytorch, processors


@pytest.fixture
def process(tmp_path):
    """A folder of /proc, and a function that writes the files of a made-up system."""

    def write(groups: str, mounts: str, **quotas: str):
        folder = tmp_path / "process"
        folder.mkdir()
        (folder / "cgroup").write_text(groups)
        (folder / "mountinfo").write_text(mounts.replace("TOP", str(tmp_path / "top")))
        for path, text in quotas.items():
            file = tmp_path / "top" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")
        return folder

    return write


V2 = "30 23 0:26 / TOP rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:27 / TOP/cpuset rw - cgroup cgroup rw,cpuset\n"
    "32 23 0:28 / TOP/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
)


@pytest.mark.parametrize(
    ("text", "quota"),
    [("200000 100000", 2.0), ("50000 100000", 0.5), ("max 100000", None), ("", None), ("7", None)],
)
def test_version_2(process, text, quota):
    folder = process("0::/jobs/ours\n", V2, **{"jobs/ours/cpu.max": text})
    assert cpu_quota(folder) == quota


def test_the_tightest_group_above_counts(process):
    quotas = {"a/b/c/cpu.max": "max 100000", "a/b/cpu.max": "150000 100000", "a/cpu.max": "9 1"}
    assert cpu_quota(process("0::/a/b/c\n", V2, **quotas)) == 1.5


@pytest.mark.parametrize(("micros", "quota"), [("150000", 1.5), ("-1", None)])
def test_version_1(process, micros, quota):
    folder = process(
        "5:cpuset:/elsewhere\n4:cpu,cpuacct:/box\n0::/\n",
        V1,
        **{
            "cpu,cpuacct/box/cpu.cfs_quota_us": micros,
            "cpu,cpuacct/box/cpu.cfs_period_us": "100000",
            "cpuset/elsewhere/cpu.cfs_quota_us": "1",
            "cpuset/elsewhere/cpu.cfs_period_us": "100000",
        },
    )
    assert cpu_quota(folder) == quota


def test_both_versions_beside_each_other(process):
    """Version 2 may be mounted without the controller of processors, as systemd's hybrid has it."""
    folder = process(
        "4:cpu,cpuacct:/\n0::/user\n",
        V1 + V2.replace("TOP", "TOP/unified"),
        **{
            "cpu,cpuacct/cpu.cfs_quota_us": "300000",
            "cpu,cpuacct/cpu.cfs_period_us": "100000",
            "unified/user/cgroup.procs": "1",
        },
    )
    assert cpu_quota(folder) == 3.0


def test_a_container_that_sees_the_names_of_its_host(process):
    """Without a namespace of groups the path is the host's, and the mount begins at it."""
    mounts = "40 23 0:28 /docker/4f TOP/a\\040b rw - cgroup cgroup rw,cpu\n"
    quotas = {"a b/cpu.cfs_quota_us": "100000", "a b/cpu.cfs_period_us": "100000"}
    assert cpu_quota(process("4:cpu:/docker/4f\n", mounts, **quotas)) == 1.0


def test_a_group_outside_of_what_is_mounted(process):
    folder = process("0::/../other\n", V2, **{"cpu.max": "100000 100000"})
    assert cpu_quota(folder) in (1.0, None)


def test_without_files_there_is_no_quota(tmp_path):
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("quota", "may", "expected"),
    [(None, 3, 3), (0.2, 3, 1), (1.0, 3, 1), (1.5, 3, 2), (64.0, 3, 3)],
)
def test_quota_and_affinity(monkeypatch, quota, may, expected):
    monkeypatch.setattr(module, "cpu_quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(may)), raising=False)
    assert processors() == expected


@pytest.mark.parametrize(("may", "threads"), [(2, 2), (8, 5)])
def test_pytorch_has_no_more_threads_than_may_run(monkeypatch, may, threads):
    monkeypatch.setattr(module, "processors", lambda: may)
    torch.set_num_threads(5)
    fit_pytorch()
    assert torch.get_num_threads() == threads
