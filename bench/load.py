"""Loads of single packets and short connections: the servers, and what a run of a client tells.

A run takes about `seconds`, sends from `pair.client` to `pair.server`, and returns a figure per
case.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import parse
from bench.errors import ProgramError
from bench.namespaces import CONGESTION_CONTROL, TOOLS, SubjectPair, run, run_together
from bench.stats import Case

PINGPONG_PORT: Final = 7001
IPERF_PORTS: Final = (5201, 5202, 5203, 5204)
"""iperf3 before 3.16 serves all streams from one thread, so four streams need four programs."""
HTTP_PORT: Final = 7004
CONNECTIONS: Final = 50
MESSAGE: Final = 64
PATIENCE: Final = 20.0

STREAM_1: Final = Case("stream_1", "Gbit/s", True, "one TCP stream, iperf3, what the receiver got")
STREAM_4: Final = Case("stream_4", "Gbit/s", True, "four TCP streams, four iperf3, their sum")
TCP_RR: Final = Case(
    "tcp_rr_one_core", "us", False, "64 bytes there and back, TCP, both ends on one core, p50"
)
UDP_RR: Final = Case(
    "udp_rr_one_core", "us", False, "64 bytes there and back, UDP, both ends on one core, p50"
)
CPU: Final = Case(
    "cpu_per_byte",
    "CPU-s/GB",
    False,
    "busy time of all cores, softirq included, in /proc/stat during stream_1, less what was busy just before",
)
CONNECT: Final = Case(
    "connect_request_close",
    "connections/s",
    True,
    "nginx, a connection for each request, wrk, 50 at a time",
)
CASES: Final = (STREAM_1, STREAM_4, TCP_RR, UDP_RR, CPU, CONNECT)

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Load:
    """A load by its name."""

    name: str
    run: Callable[[SubjectPair, float], Figures]


def one_core() -> int:
    """The core of both ends of a round trip: the last one, which handles fewest interrupts."""
    return max(os.sched_getaffinity(0))


def _iperf3(pair: SubjectPair, port: int, seconds: float) -> list[str]:
    return pair.client.enter(
        *("iperf3", "--client", str(pair.server.address), "--port", str(port), "--json"),
        *("--time", str(max(1, round(seconds))), "--congestion", CONGESTION_CONTROL),
    )


def busy_now() -> int:
    return parse.busy_ticks(Path("/proc/stat").read_text())


def stream_1(pair: SubjectPair, seconds: float) -> Figures:
    """Throughput, and CPU time per byte of the same run."""
    tick = 1 / os.sysconf("SC_CLK_TCK")
    idle_from, busy = time.monotonic(), busy_now()
    time.sleep(0.5)
    background = (busy_now() - busy) / (time.monotonic() - idle_from)
    start, busy = time.monotonic(), busy_now()
    text = run(_iperf3(pair, IPERF_PORTS[0], seconds), seconds + PATIENCE)
    ticks = busy_now() - busy - background * (time.monotonic() - start)
    transfer = parse.iperf3(text)
    figures = {STREAM_1.name: transfer.bits_per_second / 1e9}
    if ticks > 0 and transfer.bytes:
        figures[CPU.name] = ticks * tick / (transfer.bytes / 1e9)
    return figures


def stream_4(pair: SubjectPair, seconds: float) -> Figures:
    said = run_together([_iperf3(pair, port, seconds) for port in IPERF_PORTS], seconds + PATIENCE)
    return {STREAM_4.name: sum(parse.iperf3(text).bits_per_second for text in said) / 1e9}


def _round_trips(pair: SubjectPair, protocol: str, seconds: float) -> parse.RoundTrips:
    text = run(
        pair.client.enter(
            *(f"{TOOLS}/pingpong", protocol, "call", str(one_core()), str(pair.server.address)),
            *(str(PINGPONG_PORT), str(MESSAGE), str(seconds)),
        ),
        seconds + PATIENCE,
    )
    trips = parse.pingpong(text)
    if trips.lost > trips.count / 1000:
        raise ProgramError(
            f"{pair.subject}: {trips.lost} of {trips.count} {protocol} messages lost"
        )
    return trips


def tcp_rr(pair: SubjectPair, seconds: float) -> Figures:
    return {TCP_RR.name: _round_trips(pair, "tcp", seconds).p50_us}


def udp_rr(pair: SubjectPair, seconds: float) -> Figures:
    return {UDP_RR.name: _round_trips(pair, "udp", seconds).p50_us}


def _wrk(pair: SubjectPair, seconds: float, *headers: str) -> float:
    return parse.wrk(
        run(
            pair.client.enter(
                *("wrk", "--threads", "2", "--connections", str(CONNECTIONS)),
                *("--duration", f"{max(1, round(seconds))}s", *headers),
                f"http://{pair.server.address}:{HTTP_PORT}/",
            ),
            seconds + PATIENCE,
        )
    )


def connect_request_close(pair: SubjectPair, seconds: float) -> Figures:
    return {CONNECT.name: _wrk(pair, seconds, "--header", "Connection: close")}


def loads() -> tuple[Load, ...]:
    return (
        Load("stream_1", stream_1),
        Load("stream_4", stream_4),
        Load("tcp_rr", tcp_rr),
        Load("udp_rr", udp_rr),
        Load("connect_request_close", connect_request_close),
    )


NGINX_CONF: Final = f"""\
worker_processes 2;
pid /tmp/nginx.pid;
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  keepalive_requests 1000000000;
  client_body_temp_path /tmp/nginx-body;
  proxy_temp_path /tmp/nginx-proxy;
  fastcgi_temp_path /tmp/nginx-fastcgi;
  uwsgi_temp_path /tmp/nginx-uwsgi;
  scgi_temp_path /tmp/nginx-scgi;
  server {{
    listen {HTTP_PORT};
    root {TOOLS}/www;
  }}
}}
"""


def servers_script(core: int) -> str:
    """The server container's program: a shell script that starts all servers."""
    return "\n".join(
        [
            "#!/bin/sh",
            "# All servers of the measurements. The container ends when nginx does.",
            "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            f"{TOOLS}/pingpong tcp serve {core} 0.0.0.0 {PINGPONG_PORT} &",
            f"{TOOLS}/pingpong udp serve {core} 0.0.0.0 {PINGPONG_PORT} &",
            *(f"iperf3 --server --port {port} >/dev/null &" for port in IPERF_PORTS),
            f"exec nginx -c {TOOLS}/nginx.conf -g 'daemon off;'",
            "",
        ]
    )
