"""A stack that works on Docker's overlay works on FreeFlow with only the driver's name changed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from testbed import Bed, Host, wait_until
from testbed.process import run
from tests.swarm.conftest import unique

STACK = """
version: "3.8"
services:
  cache:
    image: workload:latest
    command: redis-server --protected-mode no --bind 0.0.0.0
    networks: [back]
    deploy: {{replicas: 1}}
  web:
    image: workload:latest
    command: sh -c "echo page > /var/www/html/index.html; exec nginx -g 'daemon off;'"
    networks: [back, front]
    deploy:
      replicas: 3
      endpoint_mode: {mode}
  client:
    image: workload:latest
    command: sleep infinity
    networks: [front, back]
networks:
  back:
    driver: {driver}
  front:
    driver: {driver}
    attachable: true
"""


# Not every kernel has IPVS, which overlay's VIPs need: there the stack uses dnsrr.
@pytest.mark.parametrize(("driver", "mode"), [("freeflow:latest", "vip"), ("overlay", "dnsrr")])
def test_the_same_stack_on_both_drivers(bed: Bed, manager: Host, driver: str, mode: str) -> None:
    """All services of the stack run, and the client reaches the web server and the cache by their
    short names.
    """
    name = unique("stack")
    manager.docker(
        *("stack", "deploy", "--resolve-image", "never", "-c", "-", name),
        stdin=STACK.format(driver=driver, mode=mode),
    )
    try:

        def complete() -> bool:
            text = manager.docker("stack", "services", "--format", "{{.Replicas}}", name)
            return sorted(text.split()) == ["1/1", "1/1", "3/3"]

        wait_until("all services", complete, 90, 0.5)
        host, client = next(
            (host, running[0])
            for host in bed.hosts
            if (running := host.docker("ps", "-q", "-f", f"name={name}_client").split())
        )
        page = wait_until(
            "the web",
            lambda: host.exec(client, "curl", "-s", "-m", "3", "http://web/", check=False).strip(),
            20,
        )
        assert page == "page"

        def ping_redis(name: str) -> None:
            command = ("redis-cli", "-h", name, "ping")
            wait_until(name, lambda: "PONG" in host.exec(client, *command, check=False), 20)

        if mode == "vip":
            # The cache's VIP; on overlay it needs IPVS.
            ping_redis("cache")
        ping_redis("tasks.cache")
    finally:
        manager.docker("stack", "rm", name)
        wait_until(
            "the stack's networks to go",
            lambda: not manager.docker("network", "ls", "-q", "-f", f"name={name}_").strip(),
            60,
        )


ENCRYPTED = """
version: "3.8"
services:
  secret:
    image: workload:latest
    command: sleep infinity
    networks: [secret]
    deploy: {mode: global}
networks:
  secret:
    driver: freeflow:latest
    driver_opts: {encrypted: "true"}
"""


def has_wireguard() -> bool:
    """Whether this machine's kernel has WireGuard."""
    made = subprocess.run(
        ["unshare", "--net", "ip", "link", "add", "w", "type", "wireguard"], capture_output=True
    )
    return made.returncode == 0


@pytest.mark.skipif(has_wireguard(), reason="needs a kernel without WireGuard")
def test_a_stack_with_encrypted_networks_without_wireguard(bed: Bed, manager: Host) -> None:
    """A stack that has encrypted networks on Docker's overlay is accepted as it is. On hosts whose
    kernel has no WireGuard none of its tasks starts, and `docker service ps` says why.
    """
    name = unique("stack")
    manager.docker(
        *("stack", "deploy", "--resolve-image", "never", "-c", "-", name), stdin=ENCRYPTED
    )

    def failures() -> bool:
        listed = manager.docker(
            *("service", "ps", "--no-trunc", "--format", "{{.Node}} {{.Error}}", f"{name}_secret")
        )
        told = {line.split()[0] for line in listed.splitlines() if "has no WireGuard" in line}
        return len(told) == len(bed.hosts)

    try:
        wait_until("the error of each host", failures, 90, 0.5)
        listed = manager.docker(
            *("service", "ps", "--no-trunc", "--format", "{{.Error}}", f"{name}_secret")
        )
        assert "run the container on another host" in listed
        assert not [host for host in bed.hosts if host.docker("ps", "-q", "-f", f"name={name}_")]
    finally:
        manager.docker("stack", "rm", name)


COMPOSE = """
version: "3.8"
services:
  web:
    image: workload:latest
    command: sh -c "echo page > /var/www/html/index.html; exec nginx -g 'daemon off;'"
    ports: ["8089:80"]
  client:
    image: workload:latest
    command: sleep infinity
    init: true
networks:
  default:
    driver: freeflow:latest
    driver_opts: {mtu: "1400"}
"""


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="needs docker-compose")
def test_compose(manager: Host, tmp_path: Path) -> None:
    """`docker-compose up` works with the driver's name and an option; services reach each other by
    name.
    """
    file = tmp_path / "docker-compose.yml"
    file.write_text(COMPOSE)
    project = unique("compose")
    engine = f"DOCKER_HOST=unix://{manager.root}/run/docker.sock"

    def compose(*arguments: str) -> str:
        command = ("docker-compose", "-f", str(file), "-p", project, *arguments)
        return run(["env", engine, *command], timeout=120)

    compose("up", "-d")
    try:
        page = wait_until(
            "the web", lambda: compose("exec", "-T", "client", "curl", "-s", "http://web/").strip()
        )
        assert page == "page"
        mtu = compose("exec", "-T", "client", "cat", "/sys/class/net/eth0/mtu")
        assert mtu.strip() == "1400"
    finally:
        compose("down", "-t", "1")
