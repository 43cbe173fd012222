"""Docker's calls, byte for byte: see `golden.py`."""

from __future__ import annotations

from typing import Any

import pytest

from plugin.app import CALLS, CONTENT_TYPE
from tests.contract.golden import Case, cases, forget_all
from tests.contract.places import Places, call

CASES = cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden(places: Places, kind: str, case: Case) -> None:
    """These requests get exactly these answers, and exactly these links exist afterwards."""
    with places.get(kind, case.settings) as place:
        try:
            for step in case.steps:
                reply = call(place, step.call, step.request)
                assert (reply.json, reply.status) == (step.response, step.status)
                assert reply.content_type == CONTENT_TYPE
                assert reply.body.endswith(b"\n")
            if case.links is not None:
                assert place.links() == case.links
        finally:
            forget_all(place, case.networks)
        assert place.links() == frozenset()


def test_every_call_has_cases() -> None:
    """Every call of the API has a golden case that succeeds and one that fails."""
    steps = [step for case in CASES for step in case.steps]
    never_fail = {"GetCapabilities", "GwAllocCheck"}
    assert set(CALLS) <= {step.call for step in steps if step.status == 200}
    assert set(CALLS) - never_fail <= {step.call for step in steps if step.status == 400}


def test_cases_have_names_of_their_own() -> None:
    """A failing case can be found by its name."""
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))


SUITES = {
    "moby": (
        "TestGetEmptyCapabilities",
        "TestGetExtraCapabilities",
        "TestGetInvalidCapabilities",
        "TestRemoteDriver",
        "TestDriverError",
        "TestMissingValues",
        "TestRollback",
        "TestValidRemoteDriver",
        "TestGetCapabilitiesFromLegacyDriver",
        "TestNetworkDoubleAllocate",
        "TestDockerNetworkIPAMMultipleNetworks",
        "TestDockerNetworkDriverOptions",
        "TestDockerNetworkNullIPAMDriver",
        "TestDockerNetworkMacInspect",
        "TestDockerNetworkDriverUngracefulRestart",
        "TestDockerNetworkConnectDisconnect",
    ),
    "go-plugins-helpers": (
        "TestActivate",
        "TestCapabilitiesExchange",
        "TestCreateNetworkSuccess",
        "TestProgramExternalConnectivity",
    ),
    "kuryr": (
        "test_remote_driver_endpoint",
        "test_network_driver_create_v4_network",
        "test_network_driver_create_v6_network",
        "test_network_driver_create_v4_v6_network",
        "_v6_network_wo_gw",
        "_with_netid_option",
        "_with_netname_option",
        "_with_pool_options",
        "test_network_driver_delete_network",
        "test_network_driver_delete_network_with_subnets",
        "test_create_network_bad_request",
        "test_delete_network_bad_request",
        "test_network_driver_create_endpoint",
        "test_network_driver_create_v4_v6_endpoint",
        "test_network_driver_create_endpoint_v4_in_dual_net",
        "test_network_driver_create_endpoint_with_no_mac_address",
        "test_create_endpoint_bad_request",
        "test_network_driver_endpoint_operational_info",
        "_with_no_port",
        "test_network_driver_delete_endpoint",
        "test_delete_endpoint_bad_request",
        "test_network_driver_join",
        "test_network_driver_join_multiple_subnets",
        "_join_with_static_route_return",
        "test_join_bad_request",
        "test_network_driver_leave",
        "test_leave_bad_request",
        "test_network_driver_allocate_network",
        "test_network_driver_free_network",
        "test_external_connectivity",
        "test_schema",
    ),
    "contiv": ("TestCreateAndDeleteNetwork",),
}
"""What the test suites of other drivers, and of the daemon, assert about these calls."""


@pytest.mark.parametrize(
    ("suite", "name"), [(s, name) for s, names in SUITES.items() for name in names]
)
def test_suites_of_others_are_covered(suite: str, name: str) -> None:
    """Each assertion of other drivers' tests has a case of the same name here."""
    assert any(suite in case.name and name in case.name for case in CASES)


def _routes(answer: Any) -> list[dict[str, Any]]:
    return list(answer.get("StaticRoutes") or ())


def test_no_answer_has_a_gateway() -> None:
    """No Join returns a gateway, which crashes engines 29.0.0 to 29.0.2 at Leave (moby#51554)."""
    joins = [
        step.response
        for case in CASES
        for step in case.steps
        if step.call == "Join" and step.status == 200
    ]
    assert joins
    for answer in joins:
        assert not answer.keys() & {"Gateway", "GatewayIPv6"}
        assert all(not route["Destination"].endswith("/0") for route in _routes(answer))


def test_every_route_has_a_destination() -> None:
    """Every route has a destination, on the link itself: the daemon panics without one
    (moby#28630).
    """
    routes = [route for case in CASES for step in case.steps for route in _routes(step.response)]
    assert routes
    for route in routes:
        assert route["Destination"]
        assert (route["RouteType"], route["NextHop"]) == (1, "")
