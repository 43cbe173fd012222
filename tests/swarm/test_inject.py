"""`freeflow inject` on a real host: what it writes is deployed, and its services' connections run
over shared memory.
"""

from __future__ import annotations

import json

from testbed import Bed, Host, wait_until
from testbed.images import WORKLOAD_IMAGE
from testbed.patience import patience
from tests.swarm.conftest import unique

STACK = """\
# A stack as people write it
x-place: &place
  placement:
    constraints: [node.hostname == {host}]

services:
  cache:
    image: {image}
    command: redis-server --bind 0.0.0.0 --protected-mode no --save ""
    networks: [backend]
    deploy: *place

  clients:
    image: {image}   # the same
    command: ["sleep", "1000000"]
    networks:
      backend:
    environment:
      - WHO=clients
    deploy:
      <<: *place
      # one is enough
      replicas: 1

  apart:
    image: {image}
    command: ["sleep", "1000000"]
    deploy: *place

networks:
  backend:
    driver: freeflow:latest
    attachable: true
"""


def test_injected_stack_is_accelerated(bed: Bed, manager: Host) -> None:
    """A stack goes in by a file beside the user or by stdin, is deployed, and its connections move;
    nothing is left behind.
    """
    name, folder = unique("stack"), "/root/stacks"
    text = 'version: "3.8"\n' + STACK.format(host=manager.name, image=WORKLOAD_IMAGE)
    manager.run("sh", "-c", f"mkdir -p {folder} && cat >{folder}/stack.yml", stdin=text)
    containers = manager.docker("ps", "-aq")
    manager.run("sh", "-c", f"cd {folder} && freeflow inject stack.yml -o out.yml 2>remarks")
    remarks = manager.run("cat", f"{folder}/remarks")
    assert remarks == "freeflow: the library is added to cache, clients\n"
    assert manager.docker("ps", "-aq") == containers
    by_stdin = manager.run("sh", "-c", "freeflow inject - 2>/dev/null", stdin=text)
    assert by_stdin == manager.run("cat", f"{folder}/out.yml")
    files = ("-c", f"{folder}/stack.yml", "-c", f"{folder}/out.yml")
    manager.docker("stack", "deploy", *files, name)
    try:

        def clients() -> str:
            wanted = f"label=com.docker.swarm.service.name={name}_clients"
            return manager.docker("ps", "-q", "--filter", wanted).strip()

        box = wait_until("the clients", clients, 60)
        ping = ("redis-cli", "-h", "cache", "ping")
        wait_until("redis", lambda: "PONG" in manager.exec(box, *ping, check=False), 60)
        load = manager.spawn(
            *("docker", "exec", box, "redis-benchmark", "-h", "cache", "-t", "get"),
            *("-n", "100000000", "-c", "2", "-q"),
        )
        try:

            def paths() -> list[str]:
                listed = json.loads(manager.freeflow("connections", "--json"))["connections"]
                return [
                    connection["path"]
                    for connection in listed
                    if connection["remote"].endswith(":6379")
                ]

            wait_until("connections over shared memory", lambda: paths().count("shm") >= 2, 30)
        finally:
            load.kill()
            load.wait(patience(20))
    finally:
        manager.docker("stack", "rm", name)


AS_DOCKER_READS = {
    "tabs": "services:\n  web:\n    image:\tnginx\t# a tab\n    networks: [\tb\t]\nnetworks:\n  b: {driver: freeflow:latest}\n",
    "tags": "services:\n  web:\n    image: !x nginx\n    networks: !override [b]\nnetworks:\n  b: {driver: freeflow:latest}\n",
    "words": "services:\n  on:\n    image: x\n    networks: [no, n]\n    environment: {A: 1.10, B: yes}\n"
    "networks:\n  no: {driver: freeflow:latest}\n  n:\n",
    "directive": "%YAML 1.1\n---\nservices:\n  web:\n    image: x\n    networks: [no]\nnetworks:\n  no: {driver: freeflow:latest}\n",
}


def test_what_docker_reads(bed: Bed) -> None:
    """What Docker's reader takes `freeflow inject` takes, and Docker reads the same of it
    afterwards but for the library.
    """
    host = bed.hosts[0]
    for name, text in AS_DOCKER_READS.items():
        before = host.run("docker", "stack", "config", "-c", "-", stdin=text)
        script = (
            "cat >/root/read.yml; freeflow inject /root/read.yml 2>/dev/null | "
            "docker stack config -c /root/read.yml -c -"
        )
        after = host.run("sh", "-c", script, stdin=text)
        lines = [line for line in after.splitlines() if line not in before.splitlines()]
        assert any("LD_PRELOAD" in line for line in lines), name
        assert all(
            any(
                word in line
                for word in ("LD_PRELOAD", "/run/freeflow", "bind", "volumes", "environment")
            )
            for line in lines
        ), (name, lines)
        assert [line for line in before.splitlines() if line not in after.splitlines()] == [], name


def test_programs_that_cannot(manager: Host) -> None:
    """A Go program in an image of this host is detected and named."""
    image = unique("go") + ":1"
    # The docker command itself is a Go program.
    manager.run(
        "sh",
        "-c",
        f'tar -C / -c "$(readlink -f "$(command -v docker)" | cut -c2-)" | '
        f"docker import -c 'ENTRYPOINT [\"/usr/bin/docker\"]' - {image}",
    )
    try:
        text = f"services:\n  tool: {{image: {image}, networks: [n]}}\nnetworks: {{n: {{driver: freeflow:latest}}}}\n"
        remarks = manager.run("sh", "-c", "freeflow inject - 2>&1 >/dev/null", stdin=text)
        assert "tool: can't be accelerated: /usr/bin/docker is a Go program" in remarks
    finally:
        manager.docker("rmi", image)
