"""The `freeflow` command on real hosts, as root runs it."""

from __future__ import annotations

import json

import pytest

from testbed import Bed, CommandError, Host, wait_until
from tests.swarm.conftest import NGINX, address, make_network, make_service, run_container


def test_status_is_well_and_complete(bed: Bed, manager: Host) -> None:
    """status has a clean verdict (exit code 0) and shows network, container, peer, service, VIP."""
    network = make_network(manager)
    service = make_service(manager, network, NGINX, replicas=4)
    box = run_container(manager, network)
    wait_until("the service in status", lambda: service in manager.freeflow("status"), 20)
    text = manager.freeflow("status")
    assert text.startswith("FreeFlow ")
    assert " is well: " in text.splitlines()[0]
    for expected in (network, box, str(bed.hosts[1].address), "overlay"):
        assert expected in text


def test_status_finds_a_wrong_setting(bed: Bed) -> None:
    """With an invalid setting the plugin refuses changes, and status shows the line that corrects
    it.
    """
    host = bed.hosts[3]
    host.docker("plugin", "disable", "-f", "freeflow:latest")
    host.docker("plugin", "set", "freeflow:latest", "VXLAN_PORT=many")
    host.docker("plugin", "enable", "freeflow:latest")
    wait_until(
        "the plugin", lambda: '"version"' in host.freeflow("status", "--json", check=False), 20
    )
    with pytest.raises(CommandError) as caught:
        host.freeflow("status")
    assert caught.value.code == 1
    problem = next(p for p in host.status()["problems"] if "VXLAN_PORT=many" in p["cause"])
    host.run("sh", "-c", problem["remedy"])
    wait_until(
        "the plugin", lambda: '"version"' in host.freeflow("status", "--json", check=False), 20
    )
    assert host.status()["settings"]["VXLAN_PORT"] == "4799"
    bed.wait_plugin_reported()


def test_ping_says_host_and_path(bed: Bed, manager: Host) -> None:
    """ping names the host of an address, the path and the round trip; for a VIP the task too."""
    network = make_network(manager)
    run_container(manager, network)
    far = bed.hosts[2]
    target = address(far, run_container(far, network), network)

    def answer() -> dict[str, object]:
        found: dict[str, object] = json.loads(
            manager.freeflow("ping", "--json", target, check=False)
        )
        return found

    wait_until("an answer", lambda: answer().get("round_trips_ms"))
    # The first answer may come before the fast path has been told of the network's first peer.
    wait_until("the fast path", lambda: answer()["path"] == "overlay+ebpf")
    result = answer()
    assert result["round_trips_ms"]
    assert result["host_address"] == str(far.address)
    assert not result["local"]
    name = far.docker("ps", "--format", "{{.Names}}", "--filter", f"network={network}").split()[0]
    by_name = json.loads(far.freeflow("ping", "--json", name))
    assert (by_name["address"], by_name["name"]) == (target, name)
    for nobody in ("203.0.113.9", "nobody"):
        with pytest.raises(CommandError):
            manager.freeflow("ping", nobody)


def test_doctor_finds_nothing_on_a_good_host(bed: Bed, manager: Host) -> None:
    """doctor finds nothing on a healthy host, on every engine."""
    network = make_network(manager)
    for host in bed.hosts:
        run_container(host, network)
    for host in bed.hosts:

        def findings(on: Host = host) -> list[object]:
            reported: list[object] = json.loads(on.freeflow("doctor", "--json", check=False))[
                "findings"
            ]
            return reported

        wait_until(f"nothing to find on {host.name}", lambda ask=findings: not ask(), 20, 1)  # type: ignore[misc]
        report = json.loads(host.freeflow("doctor", "--json"))
        assert len(report["passed"]) >= 8


def test_peers_bugreport_completion_and_help(bed: Bed, manager: Host) -> None:
    """The other commands work on a real host; the bug report has no secret of the Swarm."""
    network = make_network(manager)
    run_container(manager, network)
    run_container(bed.hosts[1], network)
    wait_until("the peer", lambda: str(bed.hosts[1].address) in manager.freeflow("peers"), 15)
    report = manager.freeflow("bugreport")
    assert "== status ==" in report
    token = manager.docker("swarm", "join-token", "-q", "worker").strip()
    assert token not in report
    assert "PRIVATE KEY" not in report
    assert "_FREEFLOW_COMPLETE" in manager.freeflow("completion", "bash")
    assert "freeflow ping" in manager.freeflow("--help")


def test_cleanup_refuses_while_in_use_and_leaves_nothing(bed: Bed, manager: Host) -> None:
    """cleanup names the containers in use; without any it removes all of FreeFlow's links and
    namespaces.
    """
    network = make_network(manager)
    box = run_container(manager, network)
    with pytest.raises(CommandError) as caught:
        manager.freeflow("cleanup")
    assert box in caught.value.output
    manager.docker("rm", "-f", box)
    manager.freeflow("cleanup")
    assert "ff" not in "".join(
        line.split()[0][:2] for line in manager.run("ip", "-br", "link").splitlines()
    )
    # The next container works as before.
    other = run_container(bed.hosts[1], network)
    late = run_container(manager, network)
    target = address(bed.hosts[1], other, network)
    wait_until(
        "the network after a cleanup",
        lambda: " 0% packet loss" in manager.exec(late, "ping", "-c1", "-W1", target, check=False),
        15,
    )


def test_metrics_are_served_where_asked(bed: Bed, manager: Host) -> None:
    """With METRICS_ADDR the plugin serves metrics; without it, it does not listen."""
    host = bed.hosts[3]
    host.docker("plugin", "disable", "-f", "freeflow:latest")
    host.docker("plugin", "set", "freeflow:latest", "METRICS_ADDR=127.0.0.1:9477")
    host.docker("plugin", "enable", "freeflow:latest")
    script = (
        "exec 3<>/dev/tcp/127.0.0.1/9477; printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3"
    )
    try:
        wait_until(
            "metrics", lambda: "freeflow_healthy" in host.run("bash", "-c", script, check=False), 20
        )
    finally:
        host.docker("plugin", "disable", "-f", "freeflow:latest")
        host.docker("plugin", "set", "freeflow:latest", "METRICS_ADDR=")
        host.docker("plugin", "enable", "freeflow:latest")
    wait_until(
        "the plugin", lambda: '"version"' in host.freeflow("status", "--json", check=False), 20
    )
    with pytest.raises(CommandError):
        host.run("bash", "-c", script)
    bed.wait_plugin_reported()
