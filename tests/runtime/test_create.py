"""Which containers get the library, and what changes in their configuration."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from plugin.admin import create_admin
from plugin.runtime_networks import RuntimeAnswer, RuntimeQuestion
from tests.runtime.world import ID, LARGEST, NETWORK, OTHER, PRELOAD, RuntimeWorld, go_json
from tests.unit.sockets import served
from tests.unit.statuses import admin_answers

MOUNT = {
    "destination": "/run/freeflow",
    "type": "bind",
    "options": ["rbind", "rprivate", "ro", "nosuid", "nodev"],
}
YES = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{"accelerated":true}\n'
NO = YES.replace(b"true", b"false")


def accelerated(content: bytes) -> bool:
    value = json.loads(content)
    return any(mount["destination"] == MOUNT["destination"] for mount in value["mounts"])


def test_mount_and_variable_are_added(world: RuntimeWorld) -> None:
    """A container on a FreeFlow network gets a read-only mount and LD_PRELOAD, and nothing else
    changes: neither an order nor a number.
    """
    wanted = world.config()
    wanted["mounts"].append({**MOUNT, "source": f"{world.top}/run/freeflow"})
    wanted["mounts"][-1] = {
        key: wanted["mounts"][-1][key] for key in ("destination", "type", "source", "options")
    }
    wanted["process"]["env"].append(PRELOAD)
    found = world.create()
    assert json.loads(found) == wanted
    # As text too, so that the order counts and no number became a fraction.
    assert json.dumps(json.loads(found)) == json.dumps(wanted)
    assert str(LARGEST).encode() in found


@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "data").iterdir()), ids=str)
def test_configurations_of_runc(world: RuntimeWorld, path: Path) -> None:
    """What `runc spec` of each engine writes stays the same but for the additions, in its order."""
    wanted = json.loads(path.read_bytes())
    wanted["root"]["path"] = str(world.rootfs)
    wanted["mounts"] += world.config()["mounts"][-3:]
    found = json.loads(world.create(json.dumps(wanted, indent="\t").encode() + b"\n"))
    assert found["mounts"].pop()["destination"] == "/run/freeflow"
    assert found["process"]["env"].pop() == PRELOAD
    assert json.dumps(found) == json.dumps(wanted)


def test_fractions_keep_their_text(world: RuntimeWorld) -> None:
    """A number that no double holds exactly is written as it was read."""
    text = go_json({**world.config(), "annotations": {}}).replace(
        b'"annotations":{}',
        b'"annotations":{"a":0.10000000000000000555,"b":1e400,"c":-0.0,"d":1E5}',
    )
    found = world.create(text)
    assert accelerated(found)
    assert b'{"a":0.10000000000000000555,"b":1e400,"c":-0.0,"d":1E5}' in found


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o640])
def test_mode_and_owner_stay(world: RuntimeWorld, mode: int) -> None:
    """The new configuration has the mode and the owner of the old one."""
    world.put(world.config(), mode)
    path = world.bundle / "config.json"
    if os.geteuid() == 0:
        os.chown(path, 12, 34)
    before = path.stat()
    world.call(world.arguments("create"))
    after = path.stat()
    assert accelerated(world.result())
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("LD_PRELOAD=", PRELOAD),
        ("LD_PRELOAD=/a.so", f"LD_PRELOAD=/a.so:{PRELOAD[11:]}"),
        ("LD_PRELOAD=/a.so /b.so", f"LD_PRELOAD=/a.so /b.so:{PRELOAD[11:]}"),
        (f"LD_PRELOAD=/a.so:{PRELOAD[11:]}", f"LD_PRELOAD=/a.so:{PRELOAD[11:]}"),
        (f"{PRELOAD} /b.so", f"{PRELOAD} /b.so"),
        (f"{PRELOAD}.old", f"{PRELOAD}.old:{PRELOAD[11:]}"),
    ],
)
def test_other_preloaded_libraries_stay(world: RuntimeWorld, before: str, after: str) -> None:
    """The library comes behind what is preloaded already, and never twice."""
    config = world.config()
    config["process"]["env"].insert(1, before)
    found = json.loads(world.create(config))
    assert found["process"]["env"] == [
        after if entry == before else entry for entry in config["process"]["env"]
    ]


def test_a_full_list_of_variables(world: RuntimeWorld) -> None:
    """A program whose arguments and variables nearly fill the kernel's limit still starts, because
    none is added; programs of `docker exec` neither.
    """
    for key, words, changed in (
        ("env", ["A=" + "x" * 60_000], True),
        ("env", ["A=" + "x" * 66_000], False),
        ("env", [f"A{number}=" for number in range(5_000)], False),
        ("args", ["x" * 131_071], False),
    ):
        config = world.config()
        config["process"][key] += words
        assert accelerated(world.create(config)) is changed
        world.create()
        process = processes()
        process[key] += words
        file = world.write("tmp/runc-process123", go_json(process))
        world.call(world.arguments("exec", "--process", str(file)))
        assert (json.loads(file.read_bytes()) != process) is changed


def test_run_is_as_create(world: RuntimeWorld) -> None:
    """`run` prepares the container too; `restore` doesn't, because it repeats a recorded state."""
    for command, changed in (("run", True), ("restore", False), ("delete", False)):
        world.put(world.config())
        world.call(world.arguments(command))
        assert world.passed() == world.arguments(command)
        assert accelerated(world.result()) is changed


@pytest.mark.parametrize("form", ["--bundle={}", "-bundle={}", "--b={}", "-b {}", "none"])
def test_forms_of_the_option(world: RuntimeWorld, form: str) -> None:
    """Options have all forms that runc takes; without --bundle it is the working directory."""
    words = [] if form == "none" else form.format(world.bundle).split(" ")
    world.put(world.config())
    arguments = ["--debug", "--log=/dev/null", "create", *words, world.id]
    world.call(arguments)
    assert world.passed() == arguments
    assert accelerated(world.result())


@pytest.mark.parametrize(
    "variant", ["label", "false", "variable", "library", "settings", "foreign"]
)
def test_opting_out(world: RuntimeWorld, variant: str) -> None:
    """Label, variable, uninstalling, a missing library, and another network leave it alone."""
    config = world.config()
    if variant == "label":
        world.describe({"front": NETWORK}, {"freeflow.accelerate": "off"})
    elif variant == "false":
        world.describe({"front": NETWORK}, {"freeflow.accelerate": "False"})
    elif variant == "variable":
        config["process"]["env"].append("FREEFLOW=off")
    elif variant == "library":
        (world.top / "run/freeflow/libfreeflow.so").unlink()
    elif variant == "settings":
        world.write("etc/freeflow/runtime", f"accelerate=off\nruntime={world.runtime}\n".encode())
    else:
        world.describe({"bridge": "5b" * 32})
    assert world.untouched(config)


def test_names_of_networks(world: RuntimeWorld) -> None:
    """At a container's first start Docker has written names without IDs, or IDs as names."""
    for name, network, expected in (
        ("front", "", True),
        (NETWORK, "", True),
        ("other", NETWORK, True),
        ("other", "", False),
        ("", "", False),
    ):
        world.describe({name: network})
        assert world.untouched() is not expected


def test_network_of_another_container(world: RuntimeWorld) -> None:
    """With `--network container:…` the networks are the other's, and the label is the own one."""
    world.describe({"front": NETWORK}, identifier=OTHER)
    world.describe({})
    assert accelerated(world.create(world.config(OTHER)))
    world.describe({}, {"freeflow.accelerate": "off"})
    assert world.untouched(world.config(OTHER))


def test_the_users_mounts_come_first(world: RuntimeWorld) -> None:
    """A mount at the library's folder, or one in which its directory can't be made, stays alone."""
    for mount in (
        {"destination": "/run/freeflow", "type": "bind", "source": "/run/freeflow"},
        {"destination": "/run/freeflow/", "type": "bind", "source": "/x"},
        {"destination": "/run/freeflow/sub", "type": "bind", "source": "/x"},
        {"destination": "/run", "type": "bind", "source": "/x", "options": ["rbind", "ro"]},
        {"destination": "/run/", "type": "bind", "source": "/x"},
        {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["ro"]},
        {"destination": "/var/run", "type": "bind", "source": "/x"},
        {"destination": "/a/../run", "type": "bind", "source": "/x"},
    ):
        config = world.config()
        config["mounts"].append(mount)
        assert world.untouched(config), mount
    config = world.config()
    config["mounts"].append({"destination": "/run", "type": "tmpfs", "source": "tmpfs"})
    assert accelerated(world.create(config))


def test_directory_for_the_mount(world: RuntimeWorld) -> None:
    """The runtime finds a directory for the mount in the container's files."""
    assert accelerated(world.create())
    assert (world.rootfs / "run/freeflow").is_dir()
    assert accelerated(world.create())


@pytest.mark.parametrize("kind", ["file", "link"])
@pytest.mark.parametrize("place", ["run", "run/freeflow"])
def test_no_directory_for_the_mount(world: RuntimeWorld, place: str, kind: str) -> None:
    """Where a file or a link has the directory's name, the container starts as it is, and nothing
    is made behind the link.
    """
    path = world.rootfs / place
    path.parent.mkdir(exist_ok=True)
    if kind == "file":
        path.touch()
    else:
        path.symlink_to(world.top / "tmp")
    assert world.untouched()
    assert not any((world.top / "tmp").iterdir())


def test_images_without_a_loader(world: RuntimeWorld) -> None:
    """An image without this machine's dynamic loader has no program that could preload a library.

    A loader that is a link inside the image is found; one that leads outside isn't.
    """
    for loader in world.rootfs.glob("lib*/ld-*"):
        loader.unlink()
    assert world.untouched()
    assert not (world.rootfs / "run").exists()
    (world.rootfs / "lib/ld-musl-x86_64.so.1").symlink_to("/lib64/real")
    (world.rootfs / "lib/ld-musl-aarch64.so.1").symlink_to("/lib64/real")
    assert world.untouched()
    (world.rootfs / "lib64/real").touch()
    assert accelerated(world.create())


def test_the_plugin_is_asked_about_unknown_networks(world: RuntimeWorld) -> None:
    """A network that the list lacks is asked for, with name and ID, and only `true` counts."""
    world.describe({"new": "", "bridge": "5b" * 32})
    with world.plugin(YES) as requests:
        assert accelerated(world.create())
    head, _, body = requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /admin/runtime HTTP/1.0\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert json.loads(body) == {
        "networks": [{"name": "new", "id": ""}, {"name": "bridge", "id": "5b" * 32}]
    }
    for answer in (
        NO,
        b"",
        b"HTTP/1.1 500 Oops\r\n\r\n" + YES.partition(b"\r\n\r\n")[2],
        YES[:-3],
        YES.replace(b"true", b'"true"'),
        b"{" * 5000,
        b"\r\n\r\n",
    ):
        with world.plugin(answer):
            assert world.untouched(), answer


def test_the_plugins_own_answer(world: RuntimeWorld) -> None:
    """Program and plugin understand each other, up to the longest question; an engine that needs
    too long for its answer leaves the container as it is.
    """
    asked: list[RuntimeQuestion] = []

    def answer(question: RuntimeQuestion) -> RuntimeAnswer:
        asked.append(question)
        if question.networks[0].name == "slow":
            time.sleep(0.5)
        return RuntimeAnswer(True)

    app = create_admin(admin_answers(runtime=answer))
    with served(app, world.top / "run/freeflow-admin/admin.sock"):
        for names, expected in (
            (["new"], True),
            ([f"net-{number:030}" for number in range(60)], True),
            ([f"net-{number:060}" for number in range(60)], False),
            (["new"] + [f"net-{number}" for number in range(80)], False),
            (['a"b\\c\u2028é'], True),
            (["slow"], False),
        ):
            world.describe(dict.fromkeys(names, ""))
            world.patience = 1 if names == ["slow"] else 100
            assert world.untouched() is not expected, names
    assert [network.name for network in asked[1].networks] == [
        f"net-{number:030}" for number in range(60)
    ]
    assert asked[2].networks[0].name == 'a"b\\c\u2028é'


def test_nobody_is_asked_needlessly(world: RuntimeWorld) -> None:
    """Known networks and Docker's own ones need no answer of the plugin."""
    with world.plugin(YES) as requests:
        assert accelerated(world.create())
        world.describe({"bridge": "", "host": "", "none": ""})
        assert world.untouched()
    assert requests == []


def test_a_silent_plugin(world: RuntimeWorld) -> None:
    """A plugin that takes the question and never answers keeps no container from starting."""
    world.describe({"new": ""})
    world.patience = 1
    with world.plugin(None) as requests:
        assert world.untouched()
    assert len(requests) == 1


@pytest.mark.parametrize("file", ["config.v2.json", "networks.json"])
def test_files_that_others_can_write(world: RuntimeWorld, file: str) -> None:
    """What anybody but root could have written counts as missing."""
    path = next(world.top.rglob(file))
    for mode in (0o620, 0o602, 0o666):
        path.chmod(mode)
        assert world.untouched()
    path.chmod(0o644)
    assert not world.untouched()
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))
    assert world.untouched()


def test_not_docker(world: RuntimeWorld) -> None:
    """Containers of other engines, and paths that only look like Docker's, stay as they are."""
    for source in ("/var/lib/kubelet/pods/x/etc-hosts", "hosts", "/hosts", f"/containers/{ID}", ""):
        config = world.config()
        for mount in config["mounts"]:
            if mount["destination"].startswith("/etc/"):
                mount["source"] = source
        assert world.untouched(config)


def other_runtime(world: RuntimeWorld, path: str) -> Path:
    script = world.runtime.read_bytes().replace(b"exit 0", b"echo other >&2; exit 0")
    return world.write(path, script, 0o755)


def test_real_runtime(world: RuntimeWorld) -> None:
    """The runtime is the one of the settings, or runc in PATH where that doesn't exist or is this
    program.
    """
    other = other_runtime(world, "opt/crun")
    for settings, expected in (
        (f"# by install\nruntime={other}\n", b"other\n"),
        ("runtime=/does/not/exist\n", b""),
        ("runtime=relative\n", b""),
        (f"runtime={world.program}\n", b""),
        ("runtime=/" + "x" * 5000, b""),
        ("", b""),
    ):
        world.write("etc/freeflow/runtime", settings.encode())
        world.put(world.config())
        assert world.call(world.arguments("create")).stderr == expected
        assert world.passed() == world.arguments("create")


def test_a_runtime_that_leads_back(world: RuntimeWorld) -> None:
    """A runtime that calls this program again is called once; then it is runc in PATH, and if that
    leads back too, the engine gets a message.
    """
    back = f'#!/bin/sh\nexec {world.program} "$@"\n'.encode()
    other = world.write("opt/back", back, 0o755)
    world.write("etc/freeflow/runtime", f"runtime={other}\n".encode())
    assert accelerated(world.create())
    world.runtime.write_bytes(back)
    done = world.call(world.arguments("create"), expect=127)
    assert b"there is no runc" in done.stderr


def test_no_runtime_at_all(world: RuntimeWorld) -> None:
    """Without any runtime the engine gets a message that says so."""
    world.runtime.unlink()
    done = world.call(world.arguments("create"), expect=127)
    assert b"there is no runc" in done.stderr
    assert b"there is no runc" in (world.bundle / "log.json").read_bytes()


def test_the_runtimes_status(world: RuntimeWorld) -> None:
    """The exit code is the real runtime's."""
    world.put(world.config())
    world.call(world.arguments("create"), expect=3, FREEFLOW_FAKE_STATUS="3")


@pytest.mark.parametrize(
    "arguments", [[], ["--version"], ["-h"], ["create"], ["--root"], ["--", "x"]]
)
def test_odd_arguments(world: RuntimeWorld, arguments: list[str]) -> None:
    """Arguments that have no container get to the runtime as they are."""
    world.call(arguments)
    assert world.passed() == arguments


def processes(*env: str) -> dict[str, Any]:
    return {
        "terminal": True,
        "user": {"uid": 0, "gid": 0},
        "args": ["redis-cli"],
        "env": ["PATH=/bin", *env],
        "cwd": "/",
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": LARGEST, "soft": 1024}],
    }


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ((), [PRELOAD]),
        (("LD_PRELOAD=/a.so",), [f"LD_PRELOAD=/a.so:{PRELOAD[11:]}"]),
        (("LD_PRELOAD=",), None),
        (("FREEFLOW=off",), None),
        ((PRELOAD,), None),
        (("LD_PRELOAD=/a.so", "LD_PRELOAD=/b.so"), None),
    ],
)
def test_exec(world: RuntimeWorld, env: tuple[str, ...], expected: list[str] | None) -> None:
    """Programs of `docker exec` get the library if their container has it, unless they opt out."""
    world.create()
    file = world.write("tmp/runc-process123", go_json(processes(*env)))
    before = file.read_bytes()
    arguments = world.arguments("exec", "--process", str(file), "--detach")
    world.call(arguments)
    assert world.passed() == arguments
    if expected is None:
        assert file.read_bytes() == before
    else:
        assert json.loads(file.read_bytes()) == {
            **processes(*env),
            "env": ["PATH=/bin", *expected],
        }
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(file.parent.iterdir()) == [file]


def test_exec_elsewhere(world: RuntimeWorld) -> None:
    """Without the library in the container, or in another's bundle, exec changes nothing."""
    world.describe({"bridge": ""})
    file = world.write("tmp/runc-process123", go_json(processes()))
    before = file.read_bytes()
    world.create()
    world.call(world.arguments("exec", "--process", str(file)))
    assert file.read_bytes() == before
    world.describe({"front": NETWORK})
    world.create()
    world.call([*world.arguments("exec", "--process", str(file))[:-1], OTHER])
    assert file.read_bytes() == before


def test_checkpoint(world: RuntimeWorld) -> None:
    """A container with the library can't be checkpointed, and the message says what to do; any
    other container can.
    """
    world.create()
    done = world.call(world.arguments("checkpoint"), expect=1)
    assert not world.record.exists()
    assert b"freeflow.accelerate=off" in done.stderr
    entry = json.loads((world.bundle / "log.json").read_bytes())
    assert entry["level"] == "error"
    assert "can't be checkpointed" in entry["msg"]
    world.put(world.config())
    world.call(world.arguments("checkpoint"))
    assert world.passed() == world.arguments("checkpoint")
