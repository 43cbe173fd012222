"""The router as a program: `python -m dataplane.router --socket PATH --control PATH [--watch-stdin]`.

It listens on the public socket once it has learned a snapshot over the control socket, see `dataplane/router_client.py`. With
`--watch-stdin` it ends when its standard input does: whoever started it holds the other end.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog

from dataplane.router.device_scanner import offer_devices
from dataplane.router.interhost import Equipment
from dataplane.router.relay_process import SHIPPED
from dataplane.router.router_server import RouterServer

DESCRIPTORS: Final = 1 << 20
"""Three for an arena and one for a process: so many containers can have all that they may."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="freeflow-router", description="Pairs connections.")
    parser.add_argument("--socket", type=Path, default=Path("/run/freeflow/router.sock"))
    parser.add_argument("--control", type=Path, default=Path("/run/freeflow-admin/router.sock"))
    parser.add_argument("--swarm", type=Path, help="the engine's folder of the Swarm")
    parser.add_argument("--devices", type=Path, help="where the host's /dev/infiniband is")
    parser.add_argument("--relay", type=Path, default=SHIPPED, help="the relay's program")
    parser.add_argument(
        "--memory-relay",
        action="store_true",
        help="relays of this machine alone, without a device: for tests",
    )
    parser.add_argument("--watch-stdin", action="store_true", help="end when standard input does")
    parser.add_argument(
        "--no-guard",
        action="store_true",
        help="don't let sockets refuse descriptors, as before Linux 6.16: for tests",
    )
    parser.add_argument("--log-level", default="info")
    return parser


def _allow_descriptors() -> None:
    """As many as a host's containers may need; if more than the hard limit isn't ours to allow, as many as that."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(hard, DESCRIPTORS),) * 2)
    except (OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT."""
    given = _parser().parse_args(arguments)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(given.log_level),
        logger_factory=structlog.WriteLoggerFactory(sys.stdout),
    )
    # Containers of any user come to the public socket; the plugin's own mask is for root alone.
    os.umask(0o022)
    _allow_descriptors()
    if given.devices is not None:
        offer_devices(given.devices)
    equipment = Equipment(given.swarm, given.relay, given.memory_relay)
    server = RouterServer(
        given.socket, given.control, equipment=equipment, guard=not given.no_guard
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    if given.watch_stdin:
        os.set_blocking(sys.stdin.fileno(), False)
        server.watch(sys.stdin.fileno())
    # What is made at start stays: no collection has to look at it.
    gc.freeze()
    server.run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
