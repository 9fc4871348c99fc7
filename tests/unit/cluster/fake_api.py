"""An API server of a few paths, and a kubeconfig for it, so that the client itself is part of the test."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

NAME = "app.kubernetes.io/name"


class FakeApi:
    """Answers what stands in ``answers``, by path; anything else is a Status 404.

    Connections are kept, as the real one does. What is longer than ``first_bytes`` comes to its end only when
    ``rest_may_follow`` is set.
    """

    def __init__(self) -> None:
        self.first_bytes = 2**16
        self.rest_may_follow = threading.Event()
        self.rest_may_follow.set()
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.selectors: list[str] = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 10.0

            def do_GET(self) -> None:
                url = urlsplit(self.path)
                api.selectors += parse_qs(url.query).get("labelSelector", [])
                status, body = api.answers.get(url.path.replace("%3A", ":"), (404, refusal("not found")))
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: api.first_bytes])
                if len(body) > api.first_bytes and api.rest_may_follow.wait(self.timeout):
                    with contextlib.suppress(OSError):  # whoever asked may not want it
                        self.wfile.write(body[api.first_bytes :])

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Tests read no access log."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def lists(self, kind: str, items: list[object], namespace: str = "lab") -> None:
        """What a list of ``kind`` (its plural) answers."""
        group = "api/v1" if kind == "pods" else "apis/apps/v1"
        self.answers[f"/{group}/namespaces/{namespace}/{kind}"] = 200, json.dumps({"items": items}).encode()

    def close(self) -> None:
        self.rest_may_follow.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def refusal(message: str) -> bytes:
    """A Status object."""
    return json.dumps({"kind": "Status", "status": "Failure", "message": message}).encode()


def write_kubeconfig(path: Path, server: str) -> None:
    """Two contexts: `here`, the current one, in namespace `lab`, and `there`, which names no namespace."""
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [
            {"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "lab"}},
            {"name": "there", "context": {"cluster": "c", "user": "u"}},
        ],
    }
    path.write_text(json.dumps(content))


def labels(role: str, release: str = "demo") -> dict[str, str]:
    """As the chart sets them."""
    return {NAME: "impala", "app.kubernetes.io/instance": release, "app.kubernetes.io/component": role}


def deployment(
    role: str, replicas: int, ready: int, status: Mapping[str, object] | None = None, *, release: str = "demo"
) -> object:
    """Whose newest template has been seen."""
    return {
        "metadata": {"name": f"{release}-{role}", "generation": 3, "labels": labels(role, release)},
        "spec": {"replicas": replicas},
        "status": {
            "observedGeneration": 3,
            "updatedReplicas": replicas,
            "readyReplicas": ready,
            **(status or {}),
        },
    }
