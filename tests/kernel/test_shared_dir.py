"""The folder that containers mount, on a host of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from driver.kernel import mounts, shared_dir
from testbed.kernel_hosts import RUN, Lab, eventually

TOP = Path(__file__).parents[2]
FOLDER = RUN / "freeflow"


def inside(lab: Lab, script: str) -> str:
    """Run a shell script on the host as root; returns its output, failures included."""
    host = lab.hosts[0]
    done = host.do(
        lambda: subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    )
    return done.stdout + done.stderr


def make(lab: Lab) -> Path:
    return lab.hosts[0].do(lambda: shared_dir.make(RUN))


def test_nobody_changes_it(one: Lab) -> None:
    """Its content is visible, and neither the host's path nor a container's mount of it is
    writable."""
    where = make(one)
    one.hosts[0].do(lambda: (where / "library").write_text("bytes"))
    assert inside(one, f"cat {FOLDER}/library") == "bytes"
    container = f"mkdir /run/c && mount --bind {FOLDER} /run/c && "
    for path in (FOLDER, "/run/c"):
        for command in (f"touch {path}/x", f"rm {path}/library", f"echo x > {path}/library"):
            assert "Read-only file system" in inside(
                one,
                f"{container if path == '/run/c' else ''} {command}; umount /run/c; rmdir /run/c",
            )
    assert inside(one, f"cat {FOLDER}/library") == "bytes"


def test_made_once(one: Lab) -> None:
    """A plugin that starts again finds the folder that running containers have, and mounts
    nothing."""
    make(one)
    before = inside(one, f"stat -c %i {FOLDER}; grep -c ' {FOLDER} ' /proc/self/mountinfo")
    make(one)
    assert inside(one, f"stat -c %i {FOLDER}; grep -c ' {FOLDER} ' /proc/self/mountinfo") == before
    assert before.split()[1] == "1"


def test_made_anew(one: Lab) -> None:
    """If its source was removed by hand, the folder shows the new source."""
    make(one)
    inside(one, "rm -rf /run/freeflow-admin/public")
    where = make(one)
    one.hosts[0].do(lambda: (where / "library").write_text("bytes"))
    assert inside(one, f"cat {FOLDER}/library") == "bytes"


def test_the_host_sees_it_read_only(one: Lab) -> None:
    """A folder made in the plugin's mount namespace is on the host too, and read-only there."""
    plugin = (
        f"import sys; sys.path.insert(0, {str(TOP)!r}); from pathlib import Path; "
        "from driver.kernel import mounts, shared_dir; shared_dir.make(Path('/run')).joinpath('library').write_text('bytes')"
    )
    inside(one, "mount --make-shared /run")
    said = inside(one, f'unshare --mount --propagation unchanged {sys.executable} -c "{plugin}"')
    assert said == ""
    assert inside(one, f"cat {FOLDER}/library") == "bytes"
    assert "Read-only file system" in inside(one, f"touch {FOLDER}/x")


@pytest.mark.parametrize("mounted", [False, True])
def test_what_stood_there_before_is_taken_away(one: Lab, mounted: bool) -> None:
    """A folder that Docker made for a container before the plugin's start is not shown to others:
    it is replaced, and the container's mount of it is empty and not writable any more."""
    if mounted:
        # As an earlier plugin left it, whose own folder somebody has removed.
        make(one)
        inside(one, f"umount {FOLDER}; mount -t tmpfs x {FOLDER}")
    inside(one, f"mkdir -p {FOLDER} /run/c; mount --bind {FOLDER} /run/c")
    deep = "d/" * 1500
    inside(
        one,
        f"mkdir -p /run/c/sub && cd /run/c/sub && for i in 1 2; do mkdir -p {deep}; cd {deep}; done",
    )
    inside(one, "echo evil > /run/c/libfreeflow.so; ln -s /etc /run/c/link")
    assert "evil" in inside(one, f"cat {FOLDER}/libfreeflow.so")
    where = make(one)
    assert inside(one, f"ls -A {FOLDER}") == ""
    assert inside(one, f"ls -d {FOLDER}/link 2>&1").startswith("ls: cannot access")
    one.hosts[0].do(lambda: (where / "library").write_text("bytes"))
    assert inside(one, f"cat {FOLDER}/library") == "bytes"
    assert Path("/etc/hosts").exists()
    if not mounted:
        eventually("emptied", lambda: inside(one, "ls -A /run/c") == "", 30)
        assert "nonexistent" in inside(one, "echo evil > /run/c/again")
        eventually("gone", lambda: inside(one, "ls -A /run/freeflow-admin") == "public\n", 30)


def test_removed(one: Lab) -> None:
    """After its removal it is gone from the host with its mount; a container that has it keeps
    it."""
    where = make(one)
    one.hosts[0].do(lambda: (where / "library").write_text("bytes"))
    inside(one, f"mkdir /run/c && mount --bind {FOLDER} /run/c")
    assert one.hosts[0].do(lambda: shared_dir.remove(RUN))
    assert "No such file" in inside(one, f"ls {FOLDER}")
    assert inside(one, "cat /run/c/library") == "bytes"
    assert not one.hosts[0].do(lambda: shared_dir.remove(RUN))


def test_a_socket_in_it(one: Lab) -> None:
    """A socket in the folder accepts connections through the read-only mount."""
    make(one)
    code = (
        "import socket; a = socket.socket(socket.AF_UNIX); a.bind('/run/freeflow-admin/public/s'); a.listen(); "
        "b = socket.socket(socket.AF_UNIX); b.connect('/run/freeflow/s'); a.accept(); print('reached')"
    )
    assert inside(one, f'{sys.executable} -c "{code}"') == "reached\n"


def test_options_are_those_of_the_mount(tmp_path: Path) -> None:
    """Only a mount at exactly this path counts, the last of several."""
    table = tmp_path / "mountinfo"
    table.write_text(
        "1 0 0:1 / /run rw,nosuid shared:1 - tmpfs tmpfs rw\n"
        "2 1 0:1 /a /run/freeflow rw - tmpfs tmpfs rw\n"
        "3 1 0:1 /b /run/freeflow ro,nodev - tmpfs tmpfs rw\n"
        "4 1 0:1 /c /run/freeflow/x rw - tmpfs tmpfs rw\n"
    )
    assert mounts.options_at(Path("/run/freeflow"), table) == {"ro", "nodev"}
    assert mounts.options_at(Path("/run/free"), table) == set()


@pytest.mark.parametrize("what", ["freeflow", "freeflow-admin"])
def test_something_in_the_way(one: Lab, what: str) -> None:
    """A file at the folder's path causes an error that names it."""
    inside(one, f"rm -rf /run/{what}; touch /run/{what}")
    with pytest.raises(Exception, match="/run/freeflow can't be made"):
        make(one)
