"""The libnetwork remote API (moby, `libnetwork/docs/remote.md`) as a Flask app.

Each call is a row of `CALLS`: decode, call the driver, encode. Each call has a deadline, since
Docker has none after a restart of its daemon. Past the deadline Docker gets an error, the work goes
on, and Docker's repetition finds it done, since all calls are idempotent. One place turns
exceptions into answers. Read on in `driver/driver.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Final

import msgspec
import structlog
from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException
from werkzeug.exceptions import NotFound as NotFoundPath

from driver.driver import Driver
from driver.errors import Conflict, FreeFlowError, InvalidRequest, NotFound, SettingError
from plugin import wire
from plugin.calls import CallStatistics

log = structlog.get_logger()

CONTENT_TYPE: Final = "application/vnd.docker.plugins.v1.2+json"
MAX_BODY: Final = 1 << 20
MAX_ERROR: Final = 4000
"""Characters."""
WORKERS: Final = 32
NODE_DISCOVERY: Final = 1

Answer = dict[str, Any]


def _capabilities(driver: Driver, body: bytes) -> Answer:
    # The scope decides who allocates; the connectivity scope makes Docker gossip peers.
    scope = driver.config.scope
    return {"Scope": scope, "ConnectivityScope": scope, "GwAllocChecker": True}


def _gateway_check(driver: Driver, body: bytes) -> Answer:
    # The Swarm's manager always reserves IPv4's gateway. IPv6's is skipped, which distinguishes a
    # subnet that the engine chose from one of the user: see allocate.own_subnet6.
    return {"SkipIPv4": False, "SkipIPv6": True}


def _allocate_network(driver: Driver, body: bytes) -> Answer:
    call = wire.decode(body, wire.AllocateNetwork)
    wire.subnets(call.IPv4Data, call.IPv6Data)
    return {"Options": driver.allocate_network(call.NetworkID, call.Options or {})}


def _free_network(driver: Driver, body: bytes) -> Answer:
    driver.free_network(wire.decode(body, wire.NetworkOnly).NetworkID)
    return {}


def _create_network(driver: Driver, body: bytes) -> Answer:
    call = wire.decode(body, wire.CreateNetwork)
    driver.create_network(
        call.NetworkID,
        wire.generic(call.Options),
        wire.subnets(call.IPv4Data, call.IPv6Data),
        ipv6=wire.flag(call.Options, wire.ENABLE_IPV6),
        internal=wire.flag(call.Options, wire.INTERNAL),
    )
    return {}


def _delete_network(driver: Driver, body: bytes) -> Answer:
    driver.delete_network(wire.decode(body, wire.NetworkOnly).NetworkID)
    return {}


def _create_endpoint(driver: Driver, body: bytes) -> Answer:
    call = wire.decode(body, wire.CreateEndpoint)
    interface = call.Interface or wire.Interface()
    added = driver.create_endpoint(
        call.NetworkID,
        call.EndpointID,
        ipv4=wire.ipv4("Interface.Address", interface.Address),
        ipv6=wire.ipv6("Interface.AddressIPv6", interface.AddressIPv6),
        mac=wire.mac("Interface.MacAddress", interface.MacAddress),
        driver_options=call.Options,
    )
    answer = {}
    if added.mac is not None:
        answer["MacAddress"] = added.mac
    if added.ipv6 is not None:
        answer["AddressIPv6"] = str(added.ipv6)
    return {"Interface": answer}


def _delete_endpoint(driver: Driver, body: bytes) -> Answer:
    call = wire.decode(body, wire.EndpointOnly)
    driver.delete_endpoint(call.NetworkID, call.EndpointID)
    return {}


def _endpoint_info(driver: Driver, body: bytes) -> Answer:
    call = wire.decode(body, wire.EndpointOnly)
    return {"Value": driver.endpoint_info(call.NetworkID, call.EndpointID)}


def _join(driver: Driver, body: bytes) -> Answer:
    call = wire.decode(body, wire.Join)
    joined = driver.join(call.NetworkID, call.EndpointID, wire.sandbox(call.SandboxKey))
    return {
        "InterfaceName": {"SrcName": joined.src_name, "DstPrefix": joined.dst_prefix},
        # Type 1: on the link itself. Never without a destination: the daemon panics (moby#28630).
        "StaticRoutes": [
            {"Destination": str(pool), "RouteType": 1, "NextHop": ""}
            for pool in joined.connected_routes
        ],
        "DisableGatewayService": False,
    }


def _leave(driver: Driver, body: bytes) -> Answer:
    call = wire.decode(body, wire.EndpointOnly)
    driver.leave(call.NetworkID, call.EndpointID)
    return {}


def _external_connectivity(driver: Driver, body: bytes) -> Answer:
    # For endpoints that are a container's gateway; ours never are: docker_gwbridge publishes ports.
    wire.decode(body, wire.EndpointOnly)
    return {}


def _discovered(body: bytes) -> wire.NodeAddress | None:
    if not body.strip():
        # A repeated notice without its body can be ignored: peers are polled anyway.
        return None
    call = wire.decode(body, wire.Discovery)
    if call.DiscoveryType != NODE_DISCOVERY:
        return None
    try:
        return msgspec.convert(call.DiscoveryData, wire.NodeAddress)
    except msgspec.ValidationError as error:
        raise InvalidRequest(
            "DiscoveryData", cause=str(error), remedy="is the caller Docker?"
        ) from error


def _discover_new(driver: Driver, body: bytes) -> Answer:
    node = _discovered(body)
    if node is not None:
        driver.discover_new(node.Address, node.Self)
    return {}


def _discover_delete(driver: Driver, body: bytes) -> Answer:
    node = _discovered(body)
    if node is not None:
        driver.discover_delete(node.Address)
    return {}


CALLS: Final[dict[str, Callable[[Driver, bytes], Answer]]] = {
    "GetCapabilities": _capabilities,
    "GwAllocCheck": _gateway_check,
    "AllocateNetwork": _allocate_network,
    "FreeNetwork": _free_network,
    "CreateNetwork": _create_network,
    "DeleteNetwork": _delete_network,
    "CreateEndpoint": _create_endpoint,
    "DeleteEndpoint": _delete_endpoint,
    "EndpointOperInfo": _endpoint_info,
    "Join": _join,
    "Leave": _leave,
    "ProgramExternalConnectivity": _external_connectivity,
    "RevokeExternalConnectivity": _external_connectivity,
    "DiscoverNew": _discover_new,
    "DiscoverDelete": _discover_delete,
}

# These promise nothing new, so they work with bad settings, too: a network must be removable.
_ALWAYS: Final = frozenset(
    {
        "GetCapabilities",
        "FreeNetwork",
        "DeleteNetwork",
        "DeleteEndpoint",
        "Leave",
        "EndpointOperInfo",
    }
    | {"DiscoverNew", "DiscoverDelete", "RevokeExternalConnectivity"}
)


class DeadlineExceeded(FreeFlowError):
    """The work isn't done yet. Docker gets this error, and repeats the call or gives up."""


def _reply(value: Answer, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value) + b"\n", status, content_type=CONTENT_TYPE)


def _short(text: str) -> str:
    """Limit the length: an error may quote the request."""
    return text if len(text) <= MAX_ERROR else text[:MAX_ERROR] + "…"


def _failure(error: Exception) -> Response:
    """The one place where an exception becomes an answer."""
    if isinstance(error, NotFoundPath):
        # For Docker 404 means "not implemented"; other errors fail a container's start.
        return _reply({"Err": f"{request.path[1:81]} is not a call that FreeFlow knows"}, 404)
    if isinstance(error, HTTPException):
        return _reply(
            {"Err": f"{request.method} {request.path[:81]}: {error.description}"}, error.code or 500
        )
    status = 400 if isinstance(error, InvalidRequest | NotFound | Conflict) else 500
    if not isinstance(error, FreeFlowError):
        log.exception("a bug in FreeFlow", path=request.path, exc_info=error)
        return _reply(
            {"Err": f"FreeFlow: {type(error).__name__}: {error}; run: freeflow bugreport"}, status
        )
    log.warning("request refused", path=request.path, reason=str(error))
    return _reply({"Err": _short(str(error))}, status)


def create_app(
    driver: Driver,
    *,
    deadline: float,
    statistics: CallStatistics,
    bad_settings: tuple[SettingError, ...] = (),
) -> Flask:
    """The app. `deadline` in seconds. With `bad_settings` it refuses calls that promise
    anything.
    """
    app = Flask("freeflow", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="call")

    def bounded(name: str, work: Callable[[], Answer]) -> Answer:
        future: Future[Answer] = workers.submit(work)
        try:
            return future.result(timeout=deadline)
        except FutureTimeout as error:
            if future.done():
                raise
            raise DeadlineExceeded(
                f"{name} was not done in {deadline:g} s and goes on",
                remedy="repeat the command; if it stays: freeflow doctor",
            ) from error

    def serve(name: str) -> Response:
        begin = time.perf_counter()
        failed = True
        try:
            if bad_settings and name not in _ALWAYS:
                raise bad_settings[0]
            body = request.get_data(cache=False)
            answer = bounded(name, lambda: CALLS[name](driver, body))
            failed = False
            return _reply(answer)
        finally:
            statistics.record(name, time.perf_counter() - begin, failed)

    @app.route("/Plugin.Activate", methods=["GET", "POST"])
    def activate() -> Response:
        return _reply({"Implements": ["NetworkDriver"]})

    @app.get("/NetworkDriver.GetCapabilities")
    def capabilities() -> Response:
        return serve("GetCapabilities")

    @app.post("/NetworkDriver.<name>")
    def call(name: str) -> Response:
        if name not in CALLS:
            raise NotFoundPath
        return serve(name)

    app.register_error_handler(Exception, _failure)
    return app
