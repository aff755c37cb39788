"""The memory that a process may have, by files of the test, and plans in words."""

import pytest
import torch

from nemotron3.runtime.memory import (
    MemoryPart,
    host_memory_bytes,
    in_units,
    plan_of,
    usable_memory_bytes,
)

MACHINE = "MemTotal:  8000 kB\nMemFree:  100 kB\nMemAvailable:  4000 kB\nSwapFree:  500 kB\n"
V2 = "30 23 0:26 / TOP rw - cgroup2 cgroup2 rw\n"
V1 = "31 23 0:27 / TOP/memory rw - cgroup cgroup rw,memory\n"


@pytest.fixture
def host(tmp_path):
    """Bytes of a made-up host, of its groups' files and its meminfo."""

    def measure(groups: str, mounts: str, machine: str = MACHINE, **limits: str):
        process = tmp_path / "process"
        process.mkdir()
        (process / "cgroup").write_text(groups)
        (process / "mountinfo").write_text(mounts.replace("TOP", str(tmp_path / "top")))
        for path, text in limits.items():
            file = tmp_path / "top" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")
        (tmp_path / "meminfo").write_text(machine)
        return host_memory_bytes(process, tmp_path / "meminfo")

    return measure


def test_without_a_limit_it_is_what_is_available_and_swap(host):
    assert host("0::/job\n", V2, **{"job/memory.max": "max"}) == 4500 << 10


def test_the_smallest_limit_of_the_groups_above_counts(host):
    limits = {"a/b/memory.max": "3000000", "a/memory.max": "2000000"}
    assert host("0::/a/b\n", V2, **limits) == 2_000_000


def test_version_1(host):
    limits = {"memory/box/memory.limit_in_bytes": "1000000"}
    assert host("4:memory:/box\n0::/\n", V1, **limits) == 1_000_000


def test_a_limit_above_the_machines_memory_is_none(host):
    limits = {"memory/box/memory.limit_in_bytes": "9223372036854771712"}
    assert host("4:memory:/box\n0::/\n", V1, **limits) == 4500 << 10


def test_what_no_file_tells_is_unknown(host):
    assert host("0::/\n", V2, machine="MemTotal:  8000 kB\n") is None


def test_this_machine_has_some():
    found = usable_memory_bytes(torch.device("cpu"))
    assert found is None or found > 1e6


def test_a_plan_in_words():
    plan = plan_of(
        [
            MemoryPart(name="weights", num_bytes=63_200_000_000),
            MemoryPart(name="nothing", num_bytes=0),
            MemoryPart(name="little", num_bytes=1_000),
            MemoryPart(name="activations", num_bytes=70_000_000_000, is_estimate=True),
        ]
    )
    assert (plan.total, plan.certain) == (133_200_001_000, 63_200_001_000)
    assert [part.name for part in plan.parts] == ["weights", "little", "activations"]
    assert plan.line() == "activations 70.0 GB, weights 63.2 GB"


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1.5e3, "1.5 kB"), (2e6, "2.0 MB")]
)
def test_units(num_bytes, text):
    assert in_units(num_bytes) == text
