"""An engine that answers the plugin's requests from a file, read anew for each.

    engine.py SOCKET FILE

The file has an object: path without version and query to the answer. It listens as dockerd does,
so a plugin needs no other setting. A guest needs many seconds to start dockerd itself.
"""

from __future__ import annotations

import json
import socketserver
import sys
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

SOCKET, FILE = map(Path, sys.argv[1:])


class EngineHandler(BaseHTTPRequestHandler):
    """Answers GET; a stream of events has none."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/v1."):
            path = path[path.index("/", 1) :]
        if path == "/events":
            self.send_response(200)
            self.end_headers()
            self.wfile.flush()
            time.sleep(3600)
        answers = json.loads(FILE.read_text())
        body = json.dumps(answers.get(path, {"message": "no such thing"})).encode()
        self.send_response(200 if path in answers else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        """Nothing."""

    def address_string(self) -> str:
        return "unix"


class EngineServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """A thread for each connection."""

    daemon_threads = True


SOCKET.unlink(missing_ok=True)
EngineServer(str(SOCKET), EngineHandler).serve_forever()
