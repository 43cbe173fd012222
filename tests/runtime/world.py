"""A host for freeflow-runc: Docker's files, the plugin's list and socket, and a fake runtime.

The fake runtime records its arguments and the configuration that it gets. Configurations are as
dockerd writes them: Go's compact JSON, with `<`, `>` and `&` escaped.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ID = "3f" * 32
OTHER = "4a" * 32
NETWORK = "u9zgyeugdqxuvs1ss69fsy9rr"
PRELOAD = "LD_PRELOAD=/run/freeflow/libfreeflow.so"
LARGEST = 18446744073709551615

_FAKE = """#!/bin/sh
[ "${FREEFLOW_FAKE_STATUS:-0}" = 0 ] || exit "$FREEFLOW_FAKE_STATUS"
{
    for word in "$0" "$@"; do printf '%s\\0' "$word"; done
} >'RECORD'
exit 0
"""


def go_json(value: Any) -> bytes:
    """Compact JSON as Go's encoding/json writes it."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode()


class RuntimeWorld:
    """Files below `top`, which is also what the program takes for the host's root."""

    def __init__(self, program: Path, top: Path, identifier: str = ID) -> None:
        self.program = program
        self.top = top
        self.patience = 100
        self.id = identifier
        self.bundle = top / "run/containerd/io.containerd.runtime.v2.task/moby" / identifier
        self.data = top / "var/lib/docker"
        self.rootfs = self.data / "overlay2/8d/merged"
        self.record = top / "record"
        self.runtime = top / "usr/bin/runc"
        for folder in (self.bundle, self.rootfs / "lib64", top / "etc/freeflow", top / "tmp"):
            folder.mkdir(parents=True)
        (self.rootfs / "lib64/ld-linux-x86-64.so.2").touch()
        (self.rootfs / "lib/").mkdir()
        (self.rootfs / "lib/ld-linux-aarch64.so.1").touch()
        self.write("run/freeflow/libfreeflow.so", b"\x7fELF")
        self.write("usr/bin/runc", _FAKE.replace("RECORD", str(self.record)).encode(), 0o755)
        self.write("etc/freeflow/runtime", f"runtime={self.runtime}\n".encode())
        self.list_networks({NETWORK: "front"})
        self.describe({"front": NETWORK})

    def write(self, path: str, content: bytes, mode: int = 0o600) -> Path:
        file = self.top / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        file.chmod(mode)
        return file

    def list_networks(self, networks: dict[str, str]) -> None:
        """The plugin's list."""
        self.write("run/freeflow-admin/networks.json", json.dumps({"networks": networks}).encode())

    def describe(
        self, networks: dict[str, str], labels: dict[str, str] | None = None, identifier: str = ""
    ) -> Path:
        """Docker's description of a container with networks (names to IDs)."""
        value = {
            "StreamConfig": {},
            "State": {"Running": False},
            "ID": identifier or self.id,
            "Config": {"Hostname": "3f3f", "Env": ["PATH=/bin"], "Labels": labels or {}},
            "NetworkSettings": {
                "Networks": {
                    name: {"IPAMConfig": None, "NetworkID": network, "EndpointID": ""}
                    for name, network in networks.items()
                }
            },
            "HostsPath": str(self.data / "containers" / (identifier or self.id) / "hosts"),
        }
        return self.write(
            f"var/lib/docker/containers/{identifier or self.id}/config.v2.json", go_json(value)
        )

    def config(self, owner: str | None = None) -> dict[str, Any]:
        """A configuration as dockerd makes it; `owner` has the network."""
        files = self.data / "containers" / (owner or self.id)
        return {
            "ociVersion": "1.2.0",
            "process": {
                "user": {"uid": 0, "gid": 0, "additionalGids": [0, 10]},
                "args": ["sh", "-c", "echo <a> && sleep 1 # \u2028 é\t"],
                "env": ["PATH=/usr/local/sbin:/usr/bin", "HOSTNAME=3f3f", 'WORDS=a "b" \\ / c'],
                "cwd": "/",
                "capabilities": {"bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"]},
                "rlimits": [{"type": "RLIMIT_CORE", "hard": LARGEST, "soft": LARGEST}],
                "apparmorProfile": "docker-default",
                "oomScoreAdj": 0,
            },
            "root": {"path": str(self.rootfs)},
            "hostname": "3f3f",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"]},
                *(
                    {
                        "destination": f"/etc/{name}",
                        "type": "bind",
                        "source": str(files / name),
                        "options": ["rbind", "rprivate"],
                    }
                    for name in ("resolv.conf", "hostname", "hosts")
                ),
            ],
            "hooks": {"prestart": [{"path": "/proc/1/exe", "args": ["libnetwork-setkey"]}]},
            "linux": {
                "sysctl": {"net.ipv4.ip_unprivileged_port_start": "0"},
                "resources": {
                    "devices": [{"allow": False, "access": "rwm"}],
                    "memory": {"disableOOMKiller": False, "limit": 9223372036854771712},
                    "cpu": {"shares": 0, "quota": -1},
                    "pids": {"limit": -1},
                },
                "cgroupsPath": f"system.slice:docker:{self.id}",
                "namespaces": [{"type": "mount"}, {"type": "network"}],
                "seccomp": {
                    "defaultAction": "SCMP_ACT_ERRNO",
                    "syscalls": [
                        {
                            "names": ["clone"],
                            "action": "SCMP_ACT_ALLOW",
                            "args": [{"index": 0, "value": 2114060288, "op": "SCMP_CMP_MASKED_EQ"}],
                        }
                    ],
                },
            },
        }

    def put(self, content: bytes | dict[str, Any], mode: int = 0o644) -> bytes:
        """Write the bundle's configuration; returns its bytes."""
        if isinstance(content, dict):
            content = go_json(content)
        path = self.bundle / "config.json"
        path.write_bytes(content)
        path.chmod(mode)
        return content

    def arguments(self, command: str, *more: str) -> list[str]:
        """As containerd's shim calls the runtime."""
        head = ["--root", "/run/docker/runtime-runc/moby", "--log", str(self.bundle / "log.json")]
        head += ["--log-format", "json", "--systemd-cgroup", command]
        if command in ("create", "run", "restore"):
            head += ["--bundle", str(self.bundle), "--pid-file", str(self.bundle / "init.pid")]
        return [*head, *more, self.id]

    def call(
        self, arguments: list[str], expect: int = 0, **variables: str
    ) -> subprocess.CompletedProcess[bytes]:
        """Call the program in the bundle, as the shim does."""
        self.record.unlink(missing_ok=True)
        done = subprocess.run(
            [self.program, *arguments],
            cwd=self.bundle,
            env={
                "PATH": str(self.runtime.parent),
                "FREEFLOW_TEST_ROOT": str(self.top),
                "FREEFLOW_TEST_PATIENCE": str(self.patience),
                **variables,
            },
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == expect, done.stderr.decode()
        return done

    def passed(self) -> list[str]:
        """The arguments that the fake runtime got."""
        return self.record.read_bytes().decode().split("\0")[1:-1]

    def result(self) -> bytes:
        return (self.bundle / "config.json").read_bytes()

    def create(self, content: bytes | dict[str, Any] | None = None) -> bytes:
        """Create a container; returns the configuration that the runtime got."""
        self.put(self.config() if content is None else content)
        arguments = self.arguments("create")
        self.call(arguments)
        assert self.passed() == arguments
        leftovers = [path.name for path in self.bundle.iterdir() if "freeflow" in path.name]
        assert not leftovers
        return self.result()

    def untouched(self, content: bytes | dict[str, Any] | None = None) -> bool:
        """Whether a container with this configuration starts as it is."""
        before = go_json(self.config()) if content is None else content
        before = go_json(before) if isinstance(before, dict) else before
        return self.create(before) == before

    @contextmanager
    def plugin(self, answer: bytes | None) -> Iterator[list[bytes]]:
        """The plugin's admin socket; yields requests. None: it never answers."""
        path = self.top / "run/freeflow-admin/admin.sock"
        requests: list[bytes] = []
        with socket.socket(socket.AF_UNIX) as listener:
            # The path may be too long for an address.
            folder = os.open(path.parent, os.O_PATH)
            listener.bind(f"/proc/self/fd/{folder}/{path.name}")
            listener.listen()

            def serve() -> None:
                held = []
                while True:
                    try:
                        client, _ = listener.accept()
                    except OSError:
                        break
                    requests.append(client.recv(65536))
                    held.append(client)
                    if answer is not None:
                        client.sendall(answer)
                        client.close()

            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            try:
                yield requests
            finally:
                listener.shutdown(socket.SHUT_RDWR)
                thread.join()
                path.unlink()
                os.close(folder)
