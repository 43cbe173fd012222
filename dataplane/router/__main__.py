"""The router's program: `python -m dataplane.router --socket PATH --control PATH [--watch-stdin]`.

It listens on the public socket once it has a snapshot from the control socket, see
`dataplane/router_client.py`. With `--watch-stdin` it ends when its standard input ends: the process
that started it holds the other end.
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
"""Descriptors: three per arena and one per process. Many containers can reach their limits."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="freeflow-router", description="Pairs the connections of this host's containers."
    )
    parser.add_argument("--socket", type=Path, default=Path("/run/freeflow/router.sock"))
    parser.add_argument("--control", type=Path, default=Path("/run/freeflow-admin/router.sock"))
    parser.add_argument(
        "--swarm", type=Path, help="the engine's folder with the Swarm's certificates"
    )
    parser.add_argument("--devices", type=Path, help="path of the host's /dev/infiniband")
    parser.add_argument("--relay", type=Path, default=SHIPPED, help="the relay's program")
    parser.add_argument(
        "--memory-relay",
        action="store_true",
        help="connect relays of this machine, built with --memory, without a device: for tests",
    )
    parser.add_argument(
        "--open-relay",
        action="store_true",
        help="let each connection enter TCP between relays: for tests",
    )
    parser.add_argument("--watch-stdin", action="store_true", help="end when standard input ends")
    parser.add_argument(
        "--no-guard",
        action="store_true",
        help="let sockets accept descriptors, as before Linux 6.16: for tests",
    )
    parser.add_argument("--log-level", default="info")
    return parser


def _allow_descriptors() -> None:
    """Allow as many descriptors as containers may need, or as the hard limit allows."""
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
    # Containers' processes of any user connect to the public socket; the plugin's umask is root's.
    os.umask(0o022)
    _allow_descriptors()
    if given.devices is not None:
        offer_devices(given.devices)
    equipment = Equipment(given.swarm, given.relay, given.memory_relay, given.open_relay)
    server = RouterServer(
        given.socket, given.control, equipment=equipment, guard=not given.no_guard
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    if given.watch_stdin:
        os.set_blocking(sys.stdin.fileno(), False)
        server.watch(sys.stdin.fileno())
    # Objects made at start stay for ever: the garbage collector needn't traverse them.
    gc.freeze()
    server.run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
