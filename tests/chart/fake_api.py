"""A Kubernetes API of one Secret, for `helm template --dry-run=server`: templates can look it up."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

KINDS = {
    "v1": ("Secret", "ConfigMap", "Service", "Pod"),
    "apps/v1": ("Deployment", "StatefulSet"),
    "networking.k8s.io/v1": ("NetworkPolicy",),
}
"""What there is; helm asks, and does not render what it cannot find."""


def discovery() -> dict[str, dict[str, Any]]:
    """Path -> answer, of all that tells which kinds there are."""
    groups = [version.partition("/")[0] for version in KINDS if "/" in version]
    answers: dict[str, dict[str, Any]] = {
        "/version": {"major": "1", "minor": "30", "gitVersion": "v1.30.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {
            "kind": "APIGroupList",
            "groups": [
                {"name": name, "versions": [{"groupVersion": f"{name}/v1", "version": "v1"}]}
                for name in groups
            ],
        },
    }
    for version, kinds in KINDS.items():
        answers[f"/apis/{version}" if "/" in version else f"/api/{version}"] = {
            "kind": "APIResourceList",
            "groupVersion": version,
            "resources": [
                {"name": f"{kind.lower()}s", "namespaced": True, "kind": kind, "verbs": ["get"]}
                for kind in kinds
            ],
        }
    return answers


@contextlib.contextmanager
def api_with_secret(name: str, data: dict[str, str] | None) -> Iterator[str]:
    """The address of an API in which namespace `there` has this Secret; with None it has none."""
    metadata = {
        "name": name,
        "namespace": "there",
        # Whose it is: helm does not take over what it has not made.
        "labels": {"app.kubernetes.io/managed-by": "Helm"},
        "annotations": {"meta.helm.sh/release-name": "impala", "meta.helm.sh/release-namespace": "there"},
    }
    answers = discovery()
    if data is not None:
        answers[f"/api/v1/namespaces/there/secrets/{name}"] = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": metadata,
            "data": data,
        }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            missing = {
                "kind": "Status",
                "apiVersion": "v1",
                "status": "Failure",
                "reason": "NotFound",
                "code": 404,
            }
            answer = answers.get(self.path.partition("?")[0])
            body = json.dumps(answer or missing).encode()
            self.send_response(200 if answer else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
