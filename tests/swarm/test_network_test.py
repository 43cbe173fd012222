"""`freeflow test` on real engines: a healthy Swarm passes, a broken one fails with the check's
name, and nothing stays behind.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from testbed import Bed, Host, wait_until
from testbed.bed import in_parallel
from testbed.patience import patience
from testbed.process import run
from tests.swarm.conftest import make_network

COMMAND = "/usr/local/bin/freeflow"
LABEL = "label=freeflow.test"
QUICK = {"probe", "reach", "dns", "vip", "mtu", "udp", "transfer", "shm"}
ALL = QUICK | {"ipv6", "spoofing", "ports", "rdma", "relay", "verbs", "measure"}


@pytest.fixture(scope="module")
def prepared(bed: Bed) -> Bed:
    """The Swarm; each host has the probes' image, made from the plugin's own files."""
    in_parallel([lambda h=host: h.freeflow("test", "--prepare") for host in bed.hosts])  # type: ignore[misc]
    return bed


def outcome(host: Host, *options: str) -> tuple[int, Any, str]:
    """Run the command: its exit code, its report, and its lines of progress."""
    process = host.spawn(
        *(COMMAND, "test", "--json", "-", *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        out, progress = process.communicate(timeout=patience(120))
    except subprocess.TimeoutExpired:
        process.terminate()
        raise
    assert out, progress
    return process.returncode, json.loads(out), progress


def nothing_left(bed: Bed) -> None:
    """No service, network or container of a test is there any more, on no host."""
    manager = bed.hosts[0]
    for kind in ("service", "network"):
        assert manager.docker(kind, "ls", "-q", "--filter", LABEL) == ""

    def gone(host: Host) -> bool:
        return host.docker("ps", "-aq", "--filter", "name=freeflow-test-") == ""

    for host in bed.hosts:
        # Workers remove the containers of a removed service by themselves.
        wait_until(f"the probes of {host.name} to be removed", lambda h=host: gone(h))  # type: ignore[misc]


@contextmanager
def closed_port(host: Host, port: int) -> Iterator[None]:
    """The network between the hosts drops this host's packets to a UDP port."""
    inside = ["nsenter", f"--net=/proc/{host.underlay_pid}/ns/net", "nft"]
    chain = f"type filter hook ingress device {host.port} priority 0;"
    rule = f"udp dport {port} drop"
    run([*inside, f"table netdev closed {{\nchain c {{\n{chain}\n{rule}\n}}\n}}"])
    try:
        yield
    finally:
        run([*inside, "delete", "table", "netdev", "closed"])


def test_a_healthy_swarm_passes(prepared: Bed, manager: Host) -> None:
    """On a network that is there already, all checks of all hosts and pairs pass, or say why they
    are not here; JUnit's file agrees; nothing is left but the network. The image is made from the
    plugin's files.
    """
    # Without the relay, whose check needs all processors for a while.
    network = make_network(manager, "-o", "ipv6=on", "-o", "relay=off")
    code, report, progress = outcome(manager, "--network", network, "--junit", "/tmp/report.xml")
    failed = [each for each in report["checks"] if each["outcome"] == "failed"]
    assert (code, failed, report["error"], report["left"]) == (0, [], "", []), progress
    names = [host.name for host in prepared.hosts]
    assert report["hosts"] == names
    passed: dict[str, set[str]] = {}
    for each in report["checks"]:
        assert each["outcome"] == "passed" or each["detail"], each
        if each["outcome"] == "passed":
            passed.setdefault(each["check"], set()).add(each["subject"])
    for check in ("probe", "reach", "dns", "vip", "shm"):
        assert passed[check] == set(names), check
    pairs = len(names) * (len(names) + 1) // 2
    for check in ("mtu", "udp", "transfer", "ipv6", "spoofing"):
        assert len(passed[check]) == pairs, check
    assert passed["verbs"] == set(names)
    assert passed["ports"] >= {f"{name} (host)" for name in names}
    assert {each["check"] for each in report["checks"]} == ALL
    measured = {(each["source"], each["target"]) for each in report["measurements"]}
    assert measured == {(one, other) for one in names for other in names}
    assert all(each["bits_per_second"] > 0 for each in report["measurements"])
    text = Path(f"{manager.root}/tmp/report.xml").read_text()
    (suite,) = ElementTree.fromstring(text)  # noqa: S314 — our own file
    assert len(suite.findall("testcase")) == len(report["checks"])
    assert suite.get("failures") == "0"
    assert (report["network"], report["driver"]) == (network, "freeflow:latest")
    manager.docker("network", "inspect", network)
    nothing_left(prepared)


def test_a_closed_port_is_named(prepared: Bed, manager: Host) -> None:
    """If the overlay's UDP port is closed for one host, the test fails, names this host and the
    port, and passes for all others; nothing is left.
    """
    apart = prepared.hosts[1]
    with closed_port(apart, 4799):
        code, report, _ = outcome(manager, "--quick")
    assert code == 1
    failed = [each for each in report["checks"] if each["outcome"] == "failed"]
    assert {(each["check"], each["subject"]) for each in failed} == {
        ("reach", apart.name),
        # Its tasks are among those of the VIP.
        *((each["check"], each["subject"]) for each in failed if each["check"] == "vip"),
    }
    (reach,) = [each for each in failed if each["check"] == "reach"]
    assert f"UDP port 4799 between {apart.address}" in reach["remedy"]
    assert {each["check"] for each in report["checks"]} == QUICK
    nothing_left(prepared)


def test_an_interrupted_run_leaves_nothing(prepared: Bed, manager: Host) -> None:
    """Ctrl-C ends a run with exit code 2 and removes everything, also where a shell has started it
    in the background, that is, with SIGINT ignored. What a killed run has left, the next run
    removes.
    """

    def begun() -> tuple[subprocess.Popen[str], str]:
        """A run that waits for its probes, which takes some seconds, and what it has said."""
        process = manager.spawn(
            *("sh", "-c", f"trap '' INT; echo $$ > /tmp/test.pid; exec {COMMAND} test --json -"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if "waiting for probes" in line:
                break
        return process, said

    def send(number: signal.Signals) -> None:
        manager.run("sh", "-c", f"kill -{int(number)} $(cat /tmp/test.pid)")

    def services() -> set[str]:
        return set(manager.docker("service", "ls", "-q", "--filter", LABEL).split())

    process, _ = begun()
    send(signal.SIGKILL)
    process.communicate(timeout=patience(30))
    old = services()
    assert old
    process, said = begun()
    assert "had left" in said
    assert not old & services()
    send(signal.SIGINT)
    out, progress = process.communicate(timeout=patience(120))
    assert process.returncode == 2, progress
    report = json.loads(out)
    assert (report["error"], report["left"]) == ("it was interrupted", [])
    nothing_left(prepared)


def test_it_needs_a_manager(prepared: Bed) -> None:
    """On a worker it says where to run it, with exit code 2."""
    worker = prepared.hosts[3]
    process = worker.spawn(COMMAND, "test", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, _ = process.communicate(timeout=patience(60))
    assert process.returncode == 2
    assert "manager" in out
