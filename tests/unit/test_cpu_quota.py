"""What `docker run --cpus` allows a container, by its control group."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataplane.router import cpu_quota


def made(tmp_path: Path, cgroup: str, files: dict[str, str]) -> float | None:
    """The limit of process 7, with this /proc/7/cgroup and these files of the hierarchy."""
    (tmp_path / "proc/7").mkdir(parents=True)
    (tmp_path / "proc/7/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return cpu_quota.of(7, tmp_path / "proc", tmp_path / "cgroup")


V1 = "12:pids:/docker/c\n4:cpu,cpuacct:/docker/c\n1:name=systemd:/docker/c\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "limit"),
    [
        ("0::/docker/c\n", {"docker/c/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/docker/c\n", {"docker/c/cpu.max": "max 100000\n"}, None),
        (
            "0::/pod/c\n",
            {"pod/cpu.max": "20000 100000\n", "pod/c/cpu.max": "50000 100000\n"},
            0.2,
        ),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, None),
        ("0::/../docker/c\n", {"docker/c/cpu.max": "50000 100000\n"}, None),
        ("0::/docker/c\n", {"docker/c/cpu.max": "much\n"}, None),
        ("0::/docker/c\n", {"docker/c/cpu.max": "50000 0\n"}, None),
        (
            V1,
            {
                "cpu,cpuacct/docker/c/cpu.cfs_quota_us": "150000\n",
                "cpu,cpuacct/docker/c/cpu.cfs_period_us": "100000\n",
            },
            1.5,
        ),
        (
            V1,
            {
                "cpu/docker/c/cpu.cfs_quota_us": "-1\n",
                "cpu/docker/c/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ("", {}, None),
    ],
)
def test_limits(tmp_path: Path, cgroup: str, files: dict[str, str], limit: float | None) -> None:
    """The least limit of the process's groups counts, in both versions of control groups; the whole
    machine's and others' don't.
    """
    assert made(tmp_path, cgroup, files) == limit


def test_a_process_that_is_gone(tmp_path: Path) -> None:
    """Of a process that has ended nothing is known."""
    assert cpu_quota.of(7, tmp_path, tmp_path) is None
