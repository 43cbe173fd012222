"""gunicorn on two unix sockets: Docker's, and root's for the `freeflow` command.

There is one worker process, because networks are locked in memory, and it has threads, because
joins of different containers are parallel. Keep-alive is off: an idle connection of Docker would
hold a thread. If the worker dies, gunicorn starts another one on the same sockets. If gunicorn is
killed, the worker notices and ends, and Docker starts the plugin again.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from gunicorn.app.base import BaseApplication

from plugin import logs
from plugin.deaths import WORKER, Deaths
from plugin.host_paths import ADMIN_SOCKET, HostPaths
from plugin.listening import listen
from plugin.settings import read

THREADS: Final = 16

WSGI = Callable[[dict[str, Any], Any], Iterable[bytes]]


class _Server(BaseApplication):  # type: ignore[misc]
    def __init__(self, options: dict[str, Any], load: Callable[[], WSGI]) -> None:
        self._options = options
        self._load = load
        super().__init__()

    def load_config(self) -> None:
        for name, value in self._options.items():
            self.cfg.set(name, value)

    def load(self) -> WSGI:
        return self._load()


def _by_socket(docker: WSGI, admin: WSGI) -> WSGI:
    """The admin app answers on its own socket only, the libnetwork app on Docker's only."""

    def dispatch(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        local: socket.socket = environ["gunicorn.socket"]
        name = str(local.getsockname())
        return (admin if name.endswith(ADMIN_SOCKET) else docker)(environ, start_response)

    return dispatch


def serve(listener: socket.socket, paths: HostPaths, environment: Mapping[str, str]) -> None:
    """Serve until SIGTERM. Never returns: gunicorn ends the process."""
    settings, bad_settings = read(environment)
    logs.configure(settings.log_level)

    deaths = Deaths()

    def load() -> WSGI:
        # Not imported at the top: the plugin is loaded in the worker, not in gunicorn's master.
        from plugin.composition import compose

        plugin = compose(paths, settings, bad_settings, deaths)
        plugin.start()
        return _by_socket(plugin.app, plugin.admin)

    listeners = [listener]
    if paths.host_run.is_dir():
        admin_directory = paths.admin_socket.parent
        admin_directory.mkdir(mode=0o700, exist_ok=True)
        admin_directory.chmod(0o700)
        listeners.append(listen(paths.admin_socket))
    _Server(
        {
            # Descriptors only: with one of them gunicorn ignores addresses in the same list.
            "bind": [f"fd://{os.dup(each.fileno())}" for each in listeners],
            "workers": 1,
            "worker_class": "gthread",
            "threads": THREADS,
            "keepalive": 0,
            # No worker is killed for slowness: the app has its own deadline, shorter than Docker's.
            "timeout": 0,
            "graceful_timeout": 8,
            "umask": 0o077,
            "loglevel": "error",
            "errorlog": "-",
            "proc_name": "freeflow",
            # Runs in the master, which outlives the worker.
            "child_exit": lambda _server, _worker: deaths.note(WORKER),
        },
        load,
    ).run()
