"""A real Prometheus, of Debian's package, that scrapes one address each second."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Final, TypeVar

from driver.kernel.namespace import in_netns
from testbed.patience import patience
from testbed.process import wait_until

T = TypeVar("T")

INSTALLED: Final = shutil.which("prometheus") is not None and shutil.which("promtool") is not None
CONFIG: Final = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [{rules}]
scrape_configs:
  - job_name: freeflow
    static_configs: [{{targets: ["{target}"]}}]
"""
SCRAPES: Final = 2
"""A rate needs two values."""


class Prometheus:
    """It listens on `address` of a network namespace, this process's own if none is given, and
    keeps its data in `folder`. `target` is `ADDRESS:PORT` of an exporter, `rules` a file.
    """

    def __init__(
        self, folder: Path, address: str, target: str, rules: Path, namespace: Path | None = None
    ) -> None:
        self._address = address
        self._namespace = namespace
        self.config = folder / "prometheus.yml"
        self.config.write_text(CONFIG.format(rules=rules, target=target))
        self._log = folder / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    *([] if namespace is None else ["nsenter", f"--net={namespace}"]),
                    "prometheus",
                    f"--config.file={self.config}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={address}",
                    "--log.level=warn",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def ask(self, path: str, **arguments: str) -> Any:
        """What /api/v1/PATH answers.

        Raises:
            OSError: it doesn't answer, or refuses.
        """
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"

        def get() -> Any:
            with urllib.request.urlopen(url, timeout=patience(10)) as answer:
                return json.load(answer)["data"]

        return get() if self._namespace is None else in_netns(self._namespace, get)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression has now. Raises OSError."""
        found: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return found

    def wait_scraped(self) -> None:
        """Wait until it has scraped with success often enough for rates.

        Raises:
            AssertionError: it has ended.
            TimeoutError: it has not.
        """

        def scraped() -> bool:
            assert self._process.poll() is None, self._log.read_text()
            found = self.query("sum_over_time(up[1h])")
            return bool(found) and float(found[0]["value"][1]) >= SCRAPES

        wait_until("scrapes", scraped)

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(patience(20))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
