"""A real Prometheus for tests: started with a configuration, asked over HTTP, ended whatever happens."""

from __future__ import annotations

import contextlib
import json
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from services.local.plan import reserved_ports
from tests.integration.system import START_S, Process, get
from tests.unit.learner.waiting import until


class Prometheus:
    """One that answers."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.url = f"http://127.0.0.1:{port}"

    def ready(self) -> bool:
        return get(self._port, "/-/ready")[0] == 200

    def get(self, path: str, **parameters: str) -> Any:
        """``data`` of an answer of its API."""
        asked = f"/api/v1/{path}?{urllib.parse.urlencode(parameters)}"

        def answer() -> tuple[int, str] | None:
            found = get(self._port, asked)
            return found if found[0] else None

        status, body = until(answer, "Prometheus answers", START_S)
        assert status == 200, f"{path} {parameters}: {status} {body}"
        return json.loads(body)["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """(labels, value) of every series."""
        result = self.get("query", query=expression)["result"]
        return [(each["metric"], float(each["value"][1])) for each in result]

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]


@contextlib.contextmanager
def running(binary: Path, config: Mapping[str, Any], directory: Path) -> Iterator[Prometheus]:
    """A Prometheus with this configuration, whose paths are absolute."""
    path = directory / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    command = [str(binary), f"--config.file={path}", f"--storage.tsdb.path={directory / 'tsdb'}"]
    with reserved_ports(0, 1) as (port,):
        server = Process([*command, f"--web.listen-address=127.0.0.1:{port}"], directory / "prometheus.log")
        found = Prometheus(port)

        def ready() -> bool:
            assert server.alive, server.log()
            return found.ready()

        try:
            until(ready, "Prometheus is ready", START_S)
            yield found
        finally:
            server.end()
