"""`make prepare`: test beds are made before tests, in steps that survive an interruption.

apt and mmdebstrap are fakes here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from testbed import images, verbs_packages, versions
from testbed.debian_suite import SuiteAbsentError
from testbed.images import NotPreparedError, engine_root, workload_tar
from testbed.patience import patience
from testbed.prepare import GROUPS, THINGS, prepare
from testbed.process import CommandError
from testbed.vm import guest_images as vm_images
from testbed.vm.guest_images import KERNELS, KernelAbsentError, kernel, make_kernel, root_image

BOOTSTRAP = Path(__file__).parents[2] / "plugin/image/bootstrap.sh"
APT = """#!/bin/sh
case " $* " in
*" install "*)
    debs=$(sed -n 's/^Dir::Cache::Archives "\\(.*\\)";/\\1/p' "$APT_CONFIG")
    [ -e "$debs/a_1_all.deb" ] && echo kept >>"$SAID"
    echo a >"$debs/a_1_all.deb"
    ;;
esac
"""
MMDEBSTRAP = """#!/bin/sh
set -e
for word; do before=$last last=$word; done
mkdir "$before"
echo begun >>"$SAID"
[ -z "$HANGS" ] || exec sleep 600
echo whole >"$before/content"
"""


class Machine:
    """A machine with an empty cache, and with fakes for apt and mmdebstrap."""

    def __init__(self, folder: Path) -> None:
        self.said = folder / "said"
        self.said.touch()
        self.cache = folder / "cache"
        self.target = self.cache / "engine-1"
        tools = folder / "tools"
        tools.mkdir()
        for name, text in (("apt-get", APT), ("mmdebstrap", MMDEBSTRAP)):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "FREEFLOW_CACHE": str(self.cache),
            "SAID": str(self.said),
        }

    def start(self, hangs: str = "") -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            # In the background a shell ignores SIGINT, and so does its child.
            ["env", "--default-signal=INT", BOOTSTRAP, "trixie", "one,two", self.target],
            env={**self.environment, "HANGS": hangs},
            start_new_session=True,
        )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted(tmp_path: Path, number: signal.Signals) -> None:
    """An interrupted root file system is not taken for complete; the next run reuses its
    downloads.
    """
    machine = Machine(tmp_path)
    process = machine.start(hangs="yes")
    deadline = time.monotonic() + patience(10)
    while "begun" not in machine.said.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, number)
    assert process.wait(patience(10)) != 0
    assert not machine.target.exists()
    assert machine.start().wait(patience(10)) == 0
    assert machine.said.read_text().split() == ["begun", "kept", "begun"]
    assert (machine.target / "content").read_text() == "whole\n"
    assert sorted(path.name for path in machine.cache.iterdir()) == ["downloads", "engine-1"]
    assert not any((machine.cache / "downloads").iterdir())


def test_who_uses_it_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test makes what is absent: it says at once what is missing and which command makes it."""
    monkeypatch.setenv("FREEFLOW_CACHE", str(tmp_path))
    for look in (lambda: engine_root("26.1"), workload_tar, root_image, kernel):
        with pytest.raises(NotPreparedError, match="run `make prepare`"):
            look()


def test_a_kernel_that_left_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that the archive no longer has is recorded as absent, with the reason, and tried
    again.
    """
    monkeypatch.setenv("FREEFLOW_CACHE", str(tmp_path))

    def absent(*_: object) -> None:
        raise KernelAbsentError("the Debian archive serves no bullseye")

    monkeypatch.setattr(vm_images, "_make_kernel", absent)
    for _ in range(2):
        with pytest.raises(KernelAbsentError):
            make_kernel("5.10")
        with pytest.raises(KernelAbsentError, match="serves no bullseye"):
            kernel("5.10")


def test_programs_that_left_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make prepare` says that the archive lacks programs and goes on; who needs them is told the
    reason.
    """
    monkeypatch.setenv("FREEFLOW_CACHE", str(tmp_path))
    with pytest.raises(NotPreparedError, match="run `make prepare`"):
        verbs_packages.valkey()

    def absent(name: str, *_: object, **__: object) -> None:
        raise SuiteAbsentError(f"the Debian archive serves no {name}")

    monkeypatch.setattr(verbs_packages, "DebianSuite", absent)
    said: list[str] = []
    prepare(GROUPS["verbs"], said.append)
    assert sum("serves no" in line for line in said) == len(GROUPS["verbs"])
    with pytest.raises(SuiteAbsentError, match="serves no bullseye"):
        verbs_packages.rdma_core("bullseye")
    with pytest.raises(SuiteAbsentError, match="serves no forky"):
        verbs_packages.valkey()


def test_failure_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A root file system that cannot be made is an error that names the command, and leaves no file
    system.
    """
    machine = Machine(tmp_path)
    for name, value in machine.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SAID", "/nowhere/said")
    with pytest.raises(CommandError, match=r"bootstrap\.sh"):
        images.bootstrap("trixie", "one", machine.target)
    assert not machine.target.exists()


def test_all_that_tests_use_is_prepared() -> None:
    """`make prepare` makes every engine and every kernel that tests name."""
    assert {f"engine-{version}" for version in images.ENGINES} < set(GROUPS["swarm"])
    assert {f"kernel-{name}" for name in KERNELS} < set(GROUPS["vm"])
    assert {name for group in GROUPS.values() for name in group} <= set(THINGS)


def git(*words: str | Path) -> None:
    subprocess.run(["git", *words], check=True, capture_output=True)


def test_without_a_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where git has no commit of the last version, `make prepare` says so and goes on, and who
    needs the version says what is missing.
    """
    monkeypatch.setenv("FREEFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(versions, "TOP", tmp_path)
    # Whatever repository the folder of temporary files may be in.
    git("init", tmp_path)
    said: list[str] = []
    prepare(["last-version"], said.append)
    assert "no history back to" in said[-1]
    with pytest.raises(NotPreparedError, match="the last version"):
        versions.last()


def test_the_origin_has_the_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shallow clone gets the last version's commit from its origin."""
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    git("init", origin)
    author = ("-c", "user.name=a", "-c", "user.email=a@b.example")
    for subject in ("first", "second"):
        git("-C", origin, *author, "commit", "--allow-empty", "-m", subject)
    first = subprocess.check_output(["git", "-C", origin, "rev-parse", "HEAD~1"], text=True)
    git("clone", "--depth=1", f"file://{origin}", clone)
    monkeypatch.setattr(versions, "TOP", clone)
    monkeypatch.setattr(versions, "LAST", first.strip())
    with pytest.raises(subprocess.CalledProcessError):
        git("-C", clone, "cat-file", "-e", first.strip())
    versions.fetch()
    git("-C", clone, "cat-file", "-e", first.strip())
