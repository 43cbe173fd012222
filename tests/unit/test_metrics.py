"""Prometheus metrics: the one list of them, and what a scraper gets."""

from __future__ import annotations

import socket
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from plugin.metrics import METRICS, Exporter, render
from plugin.status import Status
from testbed.patience import patience
from tests.unit.statuses import NET, NET2, endpoint, finding, network, status

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str) -> Samples:
    """As Prometheus reads it; two samples with the same labels are an error there."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found
            found[key] = sample.value
    return found


def rendered(value: Status) -> Samples:
    return samples(render(value).decode())


def test_every_metric_is_exported_as_listed() -> None:
    """Each metric of the list is exported under its name, kind and help, and no other is."""
    text = render(status()).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert set(families) == {spec.name for spec in METRICS}
    for spec in METRICS:
        assert families[spec.name].type == spec.kind
        assert families[spec.name].documentation == spec.help
        assert families[spec.name].samples
        for sample in families[spec.name].samples:
            assert set(sample.labels) == set(spec.labels)


MEASURED = {"Time": "seconds", "Duration": "seconds"} | dict.fromkeys(
    ("Bytes", "Memory", "Shared"), "bytes"
)
"""The unit of a metric whose text begins with one of these words."""


def test_names_follow_prometheus() -> None:
    """Names have the prefix and end with their base unit, without "total": the exporter adds it."""
    for spec in METRICS:
        assert spec.name.startswith("freeflow_")
        assert not spec.name.endswith("_total")
        assert spec.unit == MEASURED.get(spec.help.split()[0], "")


def test_values() -> None:
    """Values are those of the status, in base units."""
    found = rendered(status(problems=[finding("warning")]))
    net = ("network", "backend")
    assert found[("freeflow_healthy", ())] == 0
    assert found[("freeflow_problems", (("severity", "error"),))] == 0
    assert found[("freeflow_problems", (("severity", "warning"),))] == 1
    assert found[("freeflow_networks", ())] == 1
    assert found[("freeflow_endpoints", (net, ("path", "overlay")))] == 1
    assert found[("freeflow_peers", (net,))] == 1
    assert found[("freeflow_services", (net,))] == 1
    assert found[("freeflow_service_tasks", (net, ("service", "web")))] == 2
    assert found[("freeflow_receive_bytes_total", (net,))] == 5000
    assert found[("freeflow_transmit_bytes_total", (net,))] == 600
    assert found[("freeflow_spoofed_frames_total", (net,))] == 2
    assert found[("freeflow_sync_age_seconds", (net,))] == 0.3
    assert found[("freeflow_router_up", ())] == 1
    assert found[("freeflow_connections", (net, ("path", "shm"), ("reason", "")))] == 2
    assert found[("freeflow_connections", (net, ("path", "overlay"), ("reason", "remote")))] == 1
    assert found[("freeflow_router_processes", ())] == 4
    assert found[("freeflow_shared_memory_bytes", ())] == 24576
    assert found[("freeflow_upgrades_total", ())] == 8
    assert found[("freeflow_refusals_total", (("reason", "remote"),))] == 6
    assert found[("freeflow_retreats_total", (("reason", "option"),))] == 5
    assert found[("freeflow_wrong_messages_total", ())] == 7
    assert found[("freeflow_queue_pairs", (("state", "connected"),))] == 2
    assert found[("freeflow_queue_pairs", (("state", "waiting"),))] == 1
    assert found[("freeflow_queue_pairs_paired_total", ())] == 4
    assert found[("freeflow_queue_pairs_limit", ())] == 4096
    assert found[("freeflow_container_queue_pairs", (("container", "web.1.abc"),))] == 3
    assert found[("freeflow_verbs_processes", ())] == 1
    assert found[("freeflow_verbs_operations_total", ())] == 12
    assert found[("freeflow_verbs_bytes_total", ())] == 4096
    assert found[("freeflow_verbs_direct_bytes", ())] == 8192
    assert found[("freeflow_queue_pairs_refused_total", (("reason", "remote"),))] == 2
    assert found[("freeflow_requests_total", (("call", "Join"),))] == 7
    assert found[("freeflow_request_errors_total", (("call", "Join"),))] == 1
    percentile = (("call", "Join"), ("percentile", "99"))
    assert found[("freeflow_request_seconds", percentile)] == 0.02
    assert found[("freeflow_relay_cpu_limit", ())] == 0.25


def test_networks_of_one_name() -> None:
    """Networks with equal or unknown names have unique labels."""
    same = [network(), network(id=NET2), network(id="4c9d" * 16, name="")]
    found = rendered(status(networks=same))
    labels = {dict(labels)["network"] for name, labels in found if name == "freeflow_peers"}
    assert labels == {f"backend {NET[:12]}", f"backend {NET2[:12]}", "4c9d4c9d4c9d"}


def test_labels_are_escaped() -> None:
    """A name with quotes and line breaks doesn't break the format."""
    odd = 'a"b\\c\nd'
    found = rendered(status(networks=[network(name=odd)]))
    assert ("freeflow_peers", (("network", odd),)) in found


def test_nothing_to_say() -> None:
    """A host without networks has metrics, too."""
    found = rendered(status(networks=[], calls=[]))
    assert found[("freeflow_networks", ())] == 0


def test_no_router() -> None:
    """Without an answer of the router `router_up` is 0 and nothing is invented."""
    found = rendered(status(router=None))
    assert found[("freeflow_router_up", ())] == 0
    assert not [name for name, _ in found if name in ("freeflow_connections", "freeflow_refusals")]


def test_not_synced_yet() -> None:
    """An unknown age is not exported."""
    found = rendered(status(networks=[network(synced=None, endpoints=[endpoint()])]))
    assert not [name for name, _ in found if name == "freeflow_sync_age_seconds"]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_exporter(host: str) -> None:
    """The exporter serves the list on the address that was set, IPv4 or IPv6."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
    except OSError as error:
        pytest.skip(f"this machine has no {host}: {error}")
    exporter = Exporter(lambda: status(), (host, port))
    exporter.start()
    try:
        where = f"[{host}]" if ":" in host else host
        with urllib.request.urlopen(
            f"http://{where}:{port}/metrics", timeout=patience(10)
        ) as answer:
            assert answer.status == 200
            assert samples(answer.read().decode()) == rendered(status())
    finally:
        exporter.stop()


def test_taken_port(capsys: pytest.CaptureFixture[str]) -> None:
    """If the port is in use the log says so, and the plugin goes on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        exporter = Exporter(lambda: status(), taken.getsockname()[:2])
        exporter.start()
        exporter.stop()
    assert "metrics are not served" in capsys.readouterr().out
