"""The `freeflow` command, on the real admin API over a unix socket."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from flask import Flask

from dataplane.control import Connections, ContainerCounts, PathCount, VerbsFacts, VerbsObjects
from driver.balance import HERE, NONE_HERE
from driver.errors import InvalidRequest, NotFound
from plugin.admin import create_admin
from plugin.cli.commands import cli
from plugin.cli.top import TopReport
from plugin.ping import PingRequest, PingResult
from plugin.status import (
    CallStatus,
    EndpointStatus,
    Finding,
    HostStatus,
    NetworkStatus,
    PeerStatus,
    RouterStatus,
    ServiceStatus,
    Status,
)
from tests.unit.sockets import engine, served
from tests.unit.statuses import (
    EP,
    LISTED,
    LISTED_VERBS,
    NET,
    TRAFFIC,
    admin_answers,
    endpoint,
    finding,
    host,
    network,
    status,
)

TOP = Path(__file__).parents[2]
COMMANDS = (
    "status",
    "peers",
    "connections",
    "top",
    "ui",
    "test",
    "upgrade",
    "ping",
    "doctor",
    "bugreport",
    "cleanup",
    "inject",
    "runtime",
    "completion",
)

PONG = PingResult(
    address="10.0.4.2",
    network="backend",
    source="10.0.4.7",
    task="10.0.4.8",
    mac="02:42:0a:00:04:08",
    host="host2",
    host_address="192.0.2.2",
    local=False,
    path="overlay",
    sent=3,
    round_trips_ms=[0.5, 0.25, 0.75],
)
PLUGINS = [{"Name": "freeflow:latest", "Enabled": True}]


class World:
    """A host: the answers of its plugin and engine, None without one, and the command."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.status: Status | None = status()
        self.pong: PingResult | Exception = PONG
        self.engine: dict[str, Any] | None = {"/plugins": PLUGINS}
        self.pinged: list[PingRequest] = []
        self.listed = LISTED
        self.listed_verbs = LISTED_VERBS

    def _snapshot(self) -> Status:
        assert self.status is not None
        return self.status

    def _admin(self) -> Flask:
        answers = admin_answers(
            status=self._snapshot,
            ping=self._ping,
            connections=lambda: self.listed,
            verbs=lambda: self.listed_verbs,
        )
        return create_admin(answers)

    def _ping(self, wanted: PingRequest) -> PingResult:
        self.pinged.append(wanted)
        if isinstance(self.pong, Exception):
            raise self.pong
        return self.pong

    def run(self, *arguments: str) -> Result:
        admin, docker = self.directory / "admin.sock", self.directory / "docker.sock"
        with contextlib.ExitStack() as stack:
            if self.status is not None:
                stack.enter_context(served(self._admin(), admin))
            if self.engine is not None:
                stack.enter_context(served(engine(self.engine), docker))
            for path in (admin, docker):
                stack.callback(path.unlink, missing_ok=True)
            where = ["--socket", str(admin), "--engine", str(docker)]
            return CliRunner().invoke(cli, [*where, *arguments], prog_name="freeflow")

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json").output)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# --- status


def test_well(world: World) -> None:
    """Without problems the exit code is 0, and the first line says so."""
    done = world.run("status")
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert lines[0] == "FreeFlow 0.1.0 is well: 1 network, 1 endpoint"
    assert "host host1 (Swarm manager, engine 28.5.2, kernel 6.1.0)" in lines
    assert "underlay eth0 192.0.2.1 MTU 1500" in lines
    assert "  web.1.abc  10.0.4.7  -     overlay  2.0 KiB   100 B" in lines
    assert (
        "router 4 programs with the library, 1 connection in 24.0 KiB of shared memory, 1 waiting for the other end"
        in lines
    )
    assert (
        "verbs 1 program with a device, 2 connected queue pairs, 1 waiting for the peer, "
        "12 operations of 4.0 KiB, 2 refused or ended by the peer, "
        "8.0 KiB of direct memory in 2 regions" in lines
    )
    assert "  peers: host2 192.0.2.2" in lines
    assert "  web      10.0.4.2  all (even)      10.0.4.7, 10.0.4.8" in lines
    assert "  db       dnsrr     -               10.0.4.9" in lines


def test_no_command_means_status(world: World) -> None:
    """`freeflow` alone is `freeflow status`, with its exit codes."""
    assert world.run().output == world.run("status").output
    world.status = status(problems=[finding()])
    assert world.run().exit_code == 1


def test_something_is_wrong(world: World) -> None:
    """With problems the exit code is 1; the first line counts them, the last lines have cause and
    remedy.
    """
    world.status = status(problems=[finding("error"), finding("warning"), finding("warning")])
    done = world.run("status")
    assert done.exit_code == 1
    lines = done.output.splitlines()
    assert lines[0].startswith("FreeFlow 0.1.0 has 1 error and 2 warnings (see below)")
    assert lines[-3:] == [
        "warning: something is wrong",
        "    cause: its cause",
        "    do:    freeflow doctor",
    ]


NOT_RUNNING: list[tuple[Any, str]] = [
    ({"/plugins": []}, "docker plugin install --alias freeflow:latest REGISTRY/freeflow:latest"),
    ({"/plugins": None}, "docker plugin install --alias freeflow:latest REGISTRY/freeflow:latest"),
    (
        {"/plugins": [{"Name": "freeflow:v1", "Enabled": False}]},
        "docker plugin enable freeflow:v1",
    ),
    (
        {"/plugins": PLUGINS},
        "docker plugin disable -f freeflow:latest && docker plugin enable freeflow:latest",
    ),
    ({"/plugins": 500}, "systemctl status docker"),
    (None, "systemctl status docker"),
]


@pytest.mark.parametrize(("docker", "remedy"), NOT_RUNNING)
@pytest.mark.parametrize("command", ["status", "peers", "connections", "ping"])
def test_not_running(world: World, command: str, docker: Any, remedy: str) -> None:
    """If the plugin isn't running the exit code is 2, and the remedy depends on the plugin's state
    in the engine.
    """
    world.status, world.engine = None, docker
    arguments = [command, "10.0.4.2"] if command == "ping" else [command]
    done = world.run(*arguments)
    assert done.exit_code == 2
    first, last = done.output.splitlines()
    assert first.startswith("freeflow: the plugin does not answer on ")
    assert last == f"    do: {remedy}"
    assert world.json(*arguments)["error"].endswith(remedy)


def test_plugin_that_answers_nonsense(world: World) -> None:
    """A plugin of another version is reported as the cause, without a traceback."""
    world.status = None
    with served(engine({"/admin/status": {"version": 3}}), world.directory / "other.sock") as other:
        done = CliRunner().invoke(cli, ["--socket", str(other), "status"])
    assert done.exit_code == 2
    assert "have different versions" in done.output


def test_plugin_with_a_bug(world: World) -> None:
    """An error inside the plugin is shown with its remedy; the exit code is 2."""
    world.status = None
    admin = create_admin(admin_answers(status=lambda: 1 / 0))
    with served(admin, world.directory / "broken.sock") as broken:
        done = CliRunner().invoke(cli, ["--socket", str(broken), "status"])
    assert done.exit_code == 2
    assert "ZeroDivisionError" in done.output
    assert "run: freeflow bugreport" in done.output


def test_which_tasks_a_client_gets(world: World) -> None:
    """For each VIP status says which tasks a container of this host gets, and why."""
    both = ["10.0.4.7", "10.0.4.8"]
    clients = {"cart.1": "10.0.4.8", "shop.1": "10.0.4.7"}
    many = {f"c{number}": "10.0.4.7" for number in range(10)}
    world.status = status(
        networks=[
            network(
                services=[
                    ServiceStatus("near", "10.0.4.2", both, False, "local", both[:1], {}, HERE),
                    ServiceStatus("far", "10.0.4.3", both, False, "local", both, {}, NONE_HERE),
                    ServiceStatus("kept", "10.0.4.4", both, False, "source", both, clients),
                    ServiceStatus("busy", "10.0.4.5", both, False, "source", both[:1], many),
                    ServiceStatus("new", "10.0.4.6", both, False, "source"),
                ]
            )
        ],
    )
    output = world.run("status").output
    assert "near     10.0.4.2  10.0.4.7 (local: on this host)" in output
    assert "far      10.0.4.3  all (local: none on this host)" in output
    assert "cart.1 gets 10.0.4.8, shop.1 gets 10.0.4.7 (source)" in output
    assert "c7 gets 10.0.4.7 and 2 more (source)" in output
    assert "one task for each container (source)" in output


def test_many_kinds_of_networks(world: World) -> None:
    """Each network shows its special properties, and no cell of a table is empty."""
    world.status = status(
        host=host(swarm=False, manager=False, engine=""),
        networks=[
            network(
                name="",
                internal=True,
                ipv6=True,
                prefix6="fd00:1:2:3::/64",
                acceleration=False,
                endpoints=[endpoint(container="", joined=False, ipv6="fd00:1:2:3::7/64", ipv4="")],
                peers=[PeerStatus("", "192.0.2.9")],
                services=[ServiceStatus("idle", "10.0.4.3", [])],
            )
        ],
    )
    output = world.run("status").output
    assert "(not in a Swarm, engine does not answer" in output
    assert f"network (name not known yet)  {NET[:12]}" in output
    assert "fd00:1:2:3::/64, internal, acceleration off" in output
    assert f"{EP[:12]}  -        fd00:1:2:3::7  not joined" in output
    assert "  peers: 192.0.2.9" in output
    assert "  idle     10.0.4.3  -               none" in output


def test_nothing_yet(world: World) -> None:
    """Without networks the status shows how to create one."""
    world.status = status(networks=[])
    assert "docker network create -d freeflow:latest --attachable NAME" in world.run().output


# --- top


def test_top_once(world: World) -> None:
    """One report is printed without a terminal: the first line, and a table."""
    done = world.run("top", "--once", "-i", "0.2", "--filter", "db")
    assert done.exit_code == 0
    first, heads, row = done.output.splitlines()
    assert first.startswith("1 end of connections: 1 shm")
    assert heads.startswith("CONTAINER")
    assert row.startswith("web.1.abc  10.0.4.7:4000  10.0.4.8:80  db.1.def on host1  shm")


def test_top_as_json(world: World) -> None:
    """The report of a group as JSON has each of its fields."""
    done = world.run("top", "--json", "-i", "0.2", "--by", "service")
    report = msgspec.json.decode(done.output, type=TopReport, strict=True)
    assert (report.by, [(row.name, row.ends) for row in report.rows]) == ("service", [("web", 2)])
    assert set(json.loads(done.output)) == _fields(TopReport)
    assert report.reasons == TRAFFIC.reasons


def test_top_without_a_terminal(world: World) -> None:
    """Without a terminal it says what to type instead; without a plugin, why."""
    done = world.run("top")
    assert done.exit_code == 2
    assert "--once prints one report" in done.output
    world.status = None
    done = world.run("top", "--once")
    assert done.exit_code == 2
    assert "the plugin does not answer" in done.output


# --- JSON


def _fields(kind: type[msgspec.Struct]) -> set[str]:
    return set(kind.__struct_fields__)


def test_status_as_json(world: World) -> None:
    """`status --json` is the whole status, field by field, and has the same exit codes."""
    world.status = status(problems=[finding()])
    done = world.run("status", "--json")
    assert done.exit_code == 1
    assert msgspec.json.decode(done.output, type=Status) == world.status
    value = json.loads(done.output)
    shapes: list[tuple[Any, type[msgspec.Struct]]] = [
        (value, Status),
        (value["host"], HostStatus),
        (value["problems"][0], Finding),
        (value["calls"][0], CallStatus),
        (value["networks"][0], NetworkStatus),
        (value["networks"][0]["endpoints"][0], EndpointStatus),
        (value["networks"][0]["peers"][0], PeerStatus),
        (value["networks"][0]["services"][0], ServiceStatus),
        (value["router"], RouterStatus),
        (value["router"]["paths"][0], PathCount),
        (value["router"]["containers"][0], ContainerCounts),
    ]
    for part, kind in shapes:
        assert set(part) == _fields(kind)


def test_fields_that_programs_rely_on() -> None:
    """A field of `--json` is added, never renamed or removed."""
    assert _fields(Status) >= {
        *("version", "healthy", "uptime", "host", "settings"),
        *("networks", "problems", "calls", "path_counts", "router"),
    }
    assert _fields(NetworkStatus) >= {
        *("id", "name", "vni", "port", "mtu", "prefix6", "subnets", "internal", "ipv6", "path"),
        *("acceleration", "endpoints", "peers", "services", "synced", "error"),
    }
    assert _fields(EndpointStatus) >= {
        *("id", "container", "ipv4", "ipv6", "mac", "joined", "rx_bytes", "tx_bytes", "spoofed")
    }
    assert _fields(Finding) == {"severity", "what", "cause", "remedy"}
    assert _fields(PingResult) >= {
        *("address", "network", "source", "task", "mac", "host", "host_address"),
        *("local", "path", "sent", "round_trips_ms"),
    }


# --- connections


def test_paths_in_status(world: World) -> None:
    """The status shows each network's connections by path, with the reasons for slower ones."""
    lines = world.run("status").output.splitlines()
    assert "  connections: 2 on shm, 3 on overlay (remote 1, short 2)" in lines
    world.status = status(router=None)
    output = world.run("status").output
    assert "connections:" not in output
    assert "router does not answer" in output


def test_connections(world: World) -> None:
    """Each connection has a line with its path and a reason's word, which is explained below."""
    done = world.run("connections")
    assert done.exit_code == 0
    assert done.output.splitlines() == [
        "CONTAINER  LOCAL          REMOTE       PATH     WHY",
        "web.1.abc  10.0.4.7:4000  10.0.4.8:80  shm",
        "web.1.abc  10.0.4.7:5000  10.0.9.9:80  overlay  remote",
        "",
        "WHY     MEANS",
        "remote  the peer is on another host",
    ]


def test_connections_as_json(world: World) -> None:
    """The JSON has the same, with the reason's word and the age of each connection."""
    found = world.json("connections")
    assert [(each["path"], each["reason"]) for each in found["connections"]] == [
        ("overlay", "remote"),
        ("shm", None),
    ]
    assert found["connections"][1]["age"] == 3.5
    assert found["reasons"]["remote"] == "the peer is on another host"


def test_no_connections(world: World) -> None:
    """A host without connections says so."""
    world.listed = Connections(connections=(), reasons={})
    assert world.run("connections").output.startswith("no connections: ")


def test_verbs(world: World) -> None:
    """Devices and queue pairs of verbs have a line each; a queue pair's has its path, or a reason's
    word.
    """
    done = world.run("connections", "--verbs")
    assert done.exit_code == 0
    assert done.output.splitlines() == [
        "CONTAINER  PID   GIDS               QUEUE PAIRS",
        "web.1.abc  4711  10.0.4.7, fd00::7  2",
        "",
        "CONTAINER  TYPE  LOCAL            REMOTE           PATH  WHY      OPERATIONS  BYTES",
        "web.1.abc  UC    10.0.4.7 0x5000  10.0.4.8 0x9000  shm            12          4.0 KiB",
        "web.1.abc  RC    10.0.4.7 0x5001  10.0.4.9 0x7000  -     waiting  0           0 B",
        "",
        "WHY      MEANS",
        "waiting  the peer has not asked for this queue pair yet",
    ]
    waiting, connected = LISTED_VERBS.queue_pairs
    direct = msgspec.structs.replace(connected, direct="used")
    world.listed_verbs = msgspec.structs.replace(LISTED_VERBS, queue_pairs=(waiting, direct))
    head, line = (
        each.split() for each in world.run("connections", "--verbs").output.splitlines()[3:5]
    )
    assert head[3:7] == ["REMOTE", "PATH", "DIRECT", "WHY"]
    assert line[6:9] == ["shm", "used", "12"]
    found = world.json("connections", "--verbs")
    assert [each["qpn"] for each in found["queue_pairs"]] == [0x5001, 0x5000]
    assert found["devices"][0]["guid"] == "024646ff0a000407"


def test_verbs_in_status(world: World) -> None:
    """Status has a line about verbs where they are used or off, and none elsewhere."""

    def lines(verbs: VerbsFacts, **settings: str) -> list[str]:
        world.status = status(settings=settings, router=RouterStatus(up=True, verbs=verbs))
        return [line for line in world.run("status").output.splitlines() if "verbs" in line]

    assert lines(VerbsFacts()) == []
    assert lines(VerbsFacts(), VERBS="off") == ["verbs off (VERBS=off)"]
    assert lines(VerbsFacts(paired=1, operations=3, bytes=2048), VERBS="on") == [
        "verbs 0 programs with a device, 0 connected queue pairs, 0 waiting for the peer, "
        "3 operations of 2.0 KiB"
    ]
    assert lines(VerbsFacts(processes=1, direct_files=1, direct_bytes=4096), VERBS="on") == [
        "verbs 1 program with a device, 0 connected queue pairs, 0 waiting for the peer, "
        "0 operations of 0 B, 4.0 KiB of direct memory in 1 region"
    ]
    world.status = status(
        router=RouterStatus(up=True, verbs=VerbsFacts(paired=1, operations=3, bytes=2048))
    )
    found = world.json("status")["router"]["verbs"]
    assert (found["operations"], found["bytes"], found["refused"]) == (3, 2048, {})


def test_no_verbs(world: World) -> None:
    """A host without devices of verbs says so."""
    world.listed_verbs = VerbsObjects(devices=(), queue_pairs=(), reasons={})
    assert world.run("connections", "--verbs").output.startswith("no devices: ")


# --- peers


def test_peers(world: World) -> None:
    """Each other host is listed once, with the networks that it shares with this host."""
    world.status = status(networks=[network(), network(id="4c9d" * 16, name="front")])
    lines = world.run("peers").output.splitlines()
    assert lines == ["HOST   ADDRESS    NETWORKS", "host2  192.0.2.2  backend, front"]
    assert set(world.json("peers")) == {NET, "4c9d" * 16}


def test_no_peers(world: World) -> None:
    """A host without peers says so, and that is no error."""
    world.status = status(networks=[])
    done = world.run("peers")
    assert (done.exit_code, done.output[:8]) == (0, "no peers")


# --- ping


def test_ping(world: World) -> None:
    """A ping shows host, task, path and round-trip times."""
    done = world.run("ping", "10.0.4.2", "-c", "5")
    assert done.exit_code == 0
    assert world.pinged == [PingRequest("10.0.4.2", 5)]
    assert done.output.splitlines() == [
        "10.0.4.2, task 10.0.4.8 on network backend, from 10.0.4.7",
        "host host2 (192.0.2.2), path overlay",
        "3 of 3 answered, round trip 0.250 / 0.500 / 0.750 ms (least, median, most)",
    ]
    assert msgspec.convert(world.json("ping", "10.0.4.2"), PingResult) == PONG


def test_ping_by_name(world: World) -> None:
    """A ping by name shows the address and the full name."""
    world.pong = msgspec.structs.replace(PONG, name="web")
    done = world.run("ping", "web")
    assert world.pinged == [PingRequest("web", 3)]
    assert done.output.startswith("web, 10.0.4.2, task 10.0.4.8 on network backend")


def test_ping_of_this_host(world: World) -> None:
    """An address of this host is shown as such."""
    world.pong = msgspec.structs.replace(PONG, local=True, task="")
    assert "host host2 (this host), path overlay" in world.run("ping", "10.0.4.2").output


def test_ping_without_answer(world: World) -> None:
    """If nothing answers the exit code is 1, and a remedy is shown."""
    world.pong = msgspec.structs.replace(PONG, host="", task="", round_trips_ms=[])
    done = world.run("ping", "10.0.4.2")
    assert done.exit_code == 1
    assert done.output.splitlines()[1:] == [
        "host not found, path overlay",
        "0 of 3 answered",
        "    do: freeflow doctor",
    ]


@pytest.mark.parametrize(
    "error", [InvalidRequest("bad", remedy="mend it"), NotFound("none", remedy="mend it")]
)
def test_ping_refused(world: World, error: Exception) -> None:
    """A target that can't be pinged is reported with a remedy; the exit code is 1."""
    world.pong = error
    done = world.run("ping", "nonsense")
    assert done.exit_code == 1
    assert done.output.splitlines()[-1] == "    do: mend it"


@pytest.mark.parametrize("count", ["0", "21", "x"])
def test_ping_count(world: World, count: str) -> None:
    """A count out of range is refused before anything is sent, exit code 2."""
    done = world.run("ping", "10.0.4.2", "-c", count)
    assert done.exit_code == 2
    assert not world.pinged


# --- cleanup and bugreport


def test_cleanup_refuses_while_in_use(world: World) -> None:
    """Containers on FreeFlow networks are named, exit code 1, and nothing is removed."""
    done = world.run("cleanup")
    assert done.exit_code == 1
    assert "web.1.abc" in done.output
    assert done.output.splitlines()[-1] == "    do: stop them, or freeflow cleanup --force"


def test_cleanup_without_the_plugin_asks_the_engine(world: World) -> None:
    """With the plugin disabled, containers on FreeFlow networks are found through the engine."""
    world.status = None
    world.engine = {
        "/plugins": PLUGINS,
        "/containers/json": [
            {"Names": ["/db"], "NetworkSettings": {"Networks": {"n": {"NetworkID": "f"}}}},
            {"Names": ["/other"], "NetworkSettings": {"Networks": {"b": {"NetworkID": "b"}}}},
            {"Names": None, "NetworkSettings": None},
        ],
        "/networks/f": {"Driver": "freeflow:latest"},
        "/networks/b": {"Driver": "bridge"},
    }
    done = world.run("cleanup", "--json")
    assert done.exit_code == 1
    assert "use FreeFlow networks: db;" in json.loads(done.output)["error"]


def test_cleanup_without_anybody_to_ask(world: World) -> None:
    """Without plugin and engine nothing is removed, since it is unknown what is in use."""
    world.status = world.engine = None
    done = world.run("cleanup")
    assert done.exit_code == 2
    assert done.output.splitlines()[-1] == "    do: systemctl status docker"


def test_bugreport(world: World, tmp_path: Path) -> None:
    """A bug report has all parts, can be written to a file, and has no secrets of the engine."""
    # Doctor would ping peers.
    world.status = status(networks=[])
    world.engine = {
        "/plugins": [{**PLUGINS[0], "Settings": {"Env": ["MTU=", f"SESSION_KEY={'SECRET' * 6}"]}}],
        "/info": {"ServerVersion": "28.5.2", "Swarm": {"JoinTokens": "SECRET"}},
        "/version": {"Version": "28.5.2"},
    }
    output = world.run("bugreport").output
    for part in ("freeflow", "status", "doctor", "engine", "plugin", "kernel", "metrics"):
        assert f"== {part} ==\n" in output
    assert "28.5.2" in output
    assert "SECRET" not in output
    file = tmp_path / "report.json"
    done = world.run("bugreport", "--json", "-o", str(file))
    assert done.output == f"written to {file}\n"
    assert json.loads(file.read_text())["status"]["version"] == "0.1.0"


def test_bugreport_of_a_dead_host(world: World) -> None:
    """Without plugin and engine there is still a report, which says so."""
    world.status = world.engine = None
    done = world.run("bugreport")
    assert done.exit_code == 0
    assert "not available: the plugin does not answer" in done.output


# --- help and completion


def test_help_names_every_command() -> None:
    """The group's help names each command with a line of its own, and begins with examples."""
    output = CliRunner().invoke(cli, ["--help"], prog_name="freeflow").output
    assert set(COMMANDS) == set(cli.commands)
    for command in COMMANDS:
        assert f"\n  {command} " in output
    assert "freeflow ping web" in output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str) -> None:
    """Each command has help, by -h too, and no line of it is too long for a terminal."""
    output = CliRunner().invoke(cli, [command, "--help"], prog_name="freeflow").output
    assert output == CliRunner().invoke(cli, [command, "-h"], prog_name="freeflow").output
    assert len(output.splitlines()) > 5
    assert all(len(line) <= 80 for line in output.splitlines())


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c not in ("completion", "inject", "runtime", "upgrade")]
)
def test_every_command_speaks_json(command: str) -> None:
    """Every command that shows facts can print them as JSON."""
    assert "--json" in CliRunner().invoke(cli, [command, "--help"]).output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell: str) -> None:
    """The completion script of each shell calls the command itself."""
    done = CliRunner().invoke(cli, ["completion", shell], prog_name="freeflow")
    assert done.exit_code == 0
    assert f"_FREEFLOW_COMPLETE={shell}_complete" in done.output
    if shell == "bash":
        assert (
            subprocess.run(["bash", "-n"], input=done.output, text=True, check=False).returncode
            == 0
        )


def test_completion_completes() -> None:
    """Completion answers with the commands that begin with the given letters."""
    done = subprocess.run(
        [sys.executable, "-m", "plugin.cli"],
        env=os.environ
        | {"_FREEFLOW_COMPLETE": "bash_complete", "COMP_WORDS": "freeflow p", "COMP_CWORD": "1"},
        cwd=TOP,
        capture_output=True,
        text=True,
        check=True,
    )
    assert sorted(done.stdout.split()) == ["plain,peers", "plain,ping"]


def test_unknown_command() -> None:
    """An unknown command is a usage error with exit code 2."""
    assert CliRunner().invoke(cli, ["levitate"]).exit_code == 2


def test_version() -> None:
    """--version prints the version."""
    assert (
        CliRunner().invoke(cli, ["--version"], prog_name="freeflow").output
        == "freeflow, version 0.1.0\n"
    )


def test_runtime_commands(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """`runtime` passes --default on, prints what was changed, and shows the status as JSON too."""
    from plugin.cli import runtime

    class FakeSetup:
        def __init__(self, engine: object) -> None:
            pass

        def install(self, *, default: bool) -> list[str]:
            return [f"default {default}", "\x1b[31m"]

        def uninstall(self) -> list[str]:
            return ["removed"]

        def status(self) -> runtime.RuntimeStatus:
            return runtime.RuntimeStatus(program="/x", engine_default="runc")

    monkeypatch.setattr(runtime, "RuntimeSetup", FakeSetup)
    for arguments, expected in (
        (["install", "--default"], "default True\n\\x1b[31m\n"),
        (["install"], "default False\n\\x1b[31m\n"),
        (["uninstall"], "removed\n"),
    ):
        done = CliRunner().invoke(cli, ["runtime", *arguments])
        assert (done.exit_code, done.output) == (0, expected)
    assert "program /x" in CliRunner().invoke(cli, ["runtime", "status"]).output
    shown = CliRunner().invoke(cli, ["runtime", "status", "--json"]).output
    assert json.loads(shown)["engine_default"] == "runc"
