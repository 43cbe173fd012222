"""The `freeflow` command that the plugin puts on the host."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from plugin.host_command import MARK, NAME, announce, exists, install, plugin_id, remove, script
from testbed.patience import patience

ID = "0123456789abcdef" * 4
MOUNTS = f"""\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
36 35 0:25 /docker/plugins/{ID} /run/docker/plugins rw,nosuid shared:5 - tmpfs tmpfs rw
37 35 0:26 / /proc rw - proc proc rw
"""


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    file = tmp_path / "mountinfo"
    file.write_text(MOUNTS)
    return file


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "bin"
    made.mkdir()
    return made


def test_plugin_id() -> None:
    """The plugin finds its ID in the source of its socket's directory."""
    assert plugin_id(MOUNTS) == ID


@pytest.mark.parametrize(
    "mountinfo",
    [
        "",
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n",
        MOUNTS.replace(ID, "short"),
        MOUNTS.replace(ID, "G" * 64),
        MOUNTS.replace("/run/docker/plugins rw", "/elsewhere rw"),
        "broken line",
    ],
)
def test_not_in_a_plugin(mountinfo: str) -> None:
    """Outside a plugin there is no ID."""
    assert plugin_id(mountinfo) is None


def test_written(directory: Path, mounts: Path) -> None:
    """The command is written, can be run, and names this plugin's root file system."""
    assert install(directory, "/var/lib/docker", mounts)
    command = directory / NAME
    assert command.stat().st_mode & 0o777 == 0o755
    assert f"root=/var/lib/docker/plugins/{ID}/rootfs\n" in command.read_text()
    assert [path.name for path in directory.iterdir()] == [NAME]


def test_earlier_version_is_replaced(directory: Path, mounts: Path) -> None:
    """A command of an earlier version is replaced."""
    (directory / NAME).write_text(f"#!/bin/sh\n{MARK}\nold\n")
    assert install(directory, "/var/lib/docker", mounts)
    assert "old" not in (directory / NAME).read_text()


def test_replaced_in_one_step(directory: Path, mounts: Path) -> None:
    """While the command is replaced, readers see a complete file, old or new."""
    install(directory, "/first", mounts)
    whole = {script(f"{root}/plugins/{ID}/rootfs") for root in ("/first", "/second")}
    seen: set[str] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            seen.add((directory / NAME).read_text())

    reader = threading.Thread(target=look)
    reader.start()
    for number in range(200):
        assert install(directory, "/first" if number % 2 else "/second", mounts)
    stop.set()
    reader.join()
    assert seen <= whole


@pytest.mark.parametrize("content", ["", "#!/bin/sh\necho mine\n", "\0\xff binary"])
def test_foreign_file_stays(directory: Path, mounts: Path, content: str) -> None:
    """Another program of that name is neither overwritten nor removed."""
    (directory / NAME).write_text(content)
    assert not install(directory, "/var/lib/docker", mounts)
    assert not remove(directory)
    assert (directory / NAME).read_text() == content


def test_foreign_link_stays(directory: Path, mounts: Path) -> None:
    """A symbolic link is not followed, even if its target looks like our command."""
    target = directory / "elsewhere"
    target.write_text(f"{MARK}\n")
    (directory / NAME).symlink_to(target)
    assert not install(directory, "/var/lib/docker", mounts)
    assert not remove(directory)
    assert target.read_text() == f"{MARK}\n"


def test_no_place_for_it(directory: Path, mounts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If the command can't be written the plugin goes on, and logs it."""
    assert not install(directory / "none", "/var/lib/docker", mounts)
    (directory / NAME).mkdir()
    assert not install(directory, "/var/lib/docker", mounts)
    assert capsys.readouterr().out.count("the freeflow command is not installed") == 2


def test_unknown_engine_root(directory: Path, mounts: Path) -> None:
    """Without the engine's directory nothing is written: the command could not work."""
    assert not install(directory, "", mounts)
    assert not list(directory.iterdir())


def test_removed(directory: Path, mounts: Path) -> None:
    """Our own command is removed, once."""
    install(directory, "/var/lib/docker", mounts)
    assert remove(directory)
    assert not remove(directory)
    assert not remove(directory / "none")


def _run(command: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [command, *arguments], capture_output=True, text=True, timeout=patience(30), check=False
    )


def test_command_without_its_plugin(directory: Path, mounts: Path) -> None:
    """After the plugin was removed the command says so and removes itself."""
    install(directory, str(directory / "no engine's root"), mounts)
    done = _run(directory / NAME)
    assert done.returncode == 2
    assert "the plugin was removed from this host" in done.stderr
    assert not (directory / NAME).exists()


def test_command_of_another_plugin(directory: Path, mounts: Path) -> None:
    """A command whose plugin was removed while it began leaves the one of a new plugin alone, and
    hands over to it.
    """
    install(directory, str(directory / "no engine's root"), mounts)
    old = (directory / NAME).read_text()
    (directory / NAME).write_text("#!/bin/sh\necho new: $*\n")
    done = subprocess.run(
        ["sh", "-c", old, directory / NAME, "status", "--json"],
        capture_output=True,
        text=True,
        timeout=patience(30),
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "new: status --json\n", "")


@pytest.mark.parametrize("moment", ["basename", "mv", "grep", "rm"])
def test_another_plugin_meanwhile(directory: Path, mounts: Path, moment: str) -> None:
    """Whenever a new plugin puts its command there while that of the removed one removes itself, it
    stays.
    """
    install(directory, str(directory / "no engine's root"), mounts)
    tools = directory / "tools"
    tools.mkdir()
    # What the script calls, which first lets the new plugin write its command, once.
    tool = tools / moment
    tool.write_text(
        f"#!/bin/sh\n[ -e '{tools}/done' ] || {{ touch '{tools}/done'; "
        f"printf '#!/bin/sh\\necho new: $*\\n' >'{directory}/new'; chmod 755 '{directory}/new'; "
        f"/bin/mv -f '{directory}/new' '{directory / NAME}'; }}\n"
        f'exec {shutil.which(moment)} "$@"\n'
    )
    tool.chmod(0o755)
    subprocess.run(
        [directory / NAME, "status"],
        env={"PATH": f"{tools}:{os.environ['PATH']}"},
        capture_output=True,
        timeout=patience(30),
        check=False,
    )
    assert (tools / "done").exists()
    assert _run(directory / NAME, "status").stdout == "new: status\n"
    assert sorted(path.name for path in directory.iterdir()) == [NAME, "tools"]


def test_the_command_right_after_the_start(directory: Path, mounts: Path) -> None:
    """A command that is typed before the engine has said where the plugin is waits, and becomes the
    command that then appears, with the same arguments.
    """
    assert announce(directory, mounts)
    early = subprocess.Popen(
        [directory / NAME, "runtime", "install"], stdout=subprocess.PIPE, text=True
    )
    with pytest.raises(subprocess.TimeoutExpired):
        early.wait(0.3)
    new = directory / "new"
    new.write_text(f"#!/bin/sh\n{MARK}\necho new: $*\n")
    new.chmod(0o755)
    new.replace(directory / NAME)
    assert early.communicate(timeout=patience(30))[0] == "new: runtime install\n"
    assert remove(directory)


def test_the_early_command_replaces_no_other(directory: Path, mounts: Path) -> None:
    """What waits replaces the command of a removed plugin, and neither this plugin's own, nor
    another program's.
    """
    install(directory, "/var/lib/docker", mounts)
    before = (directory / NAME).read_text()
    assert not announce(directory, mounts)
    assert (directory / NAME).read_text() == before
    (directory / NAME).write_text(before.replace(ID, ID[::-1]))
    assert announce(directory, mounts)
    assert install(directory, "/var/lib/docker", mounts)
    assert (directory / NAME).read_text() == before
    (directory / NAME).write_text("#!/bin/sh\necho mine\n")
    assert not announce(directory, mounts)
    assert (directory / NAME).read_text() == "#!/bin/sh\necho mine\n"
    assert not announce(directory / "none", mounts)
    mounts.write_text("")
    assert not announce(directory, mounts)


def test_missing_command_is_noticed(directory: Path, mounts: Path) -> None:
    """exists() is true for any file of that name, and where none can be installed."""
    assert not exists(directory)
    install(directory, "/var/lib/docker", mounts)
    assert exists(directory)
    assert exists(directory / "none")


@pytest.mark.parametrize("root", ["/plain", "/with blank", "/with'quote", '/with"$(quote)`'])
def test_script_is_sound(directory: Path, root: str) -> None:
    """The script is valid for any name of the engine's directory."""
    file = directory / NAME
    file.write_text(script(root))
    assert subprocess.run(["sh", "-n", file], check=False).returncode == 0
    shown = subprocess.run(
        ["sh", "-c", f'{script(root).split("if [")[0]}printf %s "$root"'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == root


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_script_passes_shellcheck(directory: Path, mounts: Path) -> None:
    """The scripts pass shellcheck."""
    assert announce(directory, mounts)
    (directory / NAME).rename(directory / "early")
    assert install(directory, "/var/lib/docker", mounts)
    words = ["shellcheck", str(directory / "early"), str(directory / NAME)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def _copy_program(name: str, root: Path) -> None:
    """Copies a program into /bin of another root, with its libraries."""
    program = shutil.which(name)
    assert program is not None
    shutil.copy(program, root / "bin" / name)
    linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for library in (word for word in linked.split() if word.startswith("/")):
        place = root / library[1:]
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, place)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for mount namespaces")
@pytest.mark.kernel
def test_command_runs_in_the_root_file_system(tmp_path: Path, mounts: Path) -> None:
    """The command sees the plugin's root, the host's /run and its own directory, gets all
    arguments, and leaves no mount.
    """
    root = tmp_path / "engine/plugins" / ID / "rootfs"
    for name in ("proc", "sys", "dev", "usr/bin", "bin"):
        (root / name).mkdir(parents=True)
    for program in ("sh", "ls"):
        _copy_program(program, root)
    python = root / "usr/bin/python3"
    python.write_text(
        "#!/bin/sh\n"
        'echo "arguments: $*"\n'
        "ls /host/bin\n"
        "[ -e /proc/self ] && [ -e /dev/null ] && [ -d /host/run ] && echo there\n"
        "exit 7\n"
    )
    python.chmod(0o755)
    place = tmp_path / "o'bin"
    place.mkdir()
    assert install(place, str(tmp_path / "engine"), mounts)
    before = Path("/proc/self/mountinfo").read_text()
    done = _run(place / NAME, "ping", "10.0.0.1", "two words")
    assert done.stdout.splitlines() == [
        "arguments: -P -m plugin.cli ping 10.0.0.1 two words",
        NAME,
        "there",
    ], done.stderr
    assert done.returncode == 7
    assert Path("/proc/self/mountinfo").read_text() == before
