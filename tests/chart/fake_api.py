"""A Kubernetes API of a few objects, for `helm template --dry-run=server`: templates can look them up."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from tests.chart.rendering import CHART, Object, helm

KINDS = {
    "v1": ("Secret", "ConfigMap", "Service", "Pod"),
    "apps/v1": ("Deployment", "StatefulSet"),
    "networking.k8s.io/v1": ("NetworkPolicy",),
    "keda.sh/v1alpha1": ("ScaledObject",),
}
"""What there is; helm asks, and does not render what it cannot find."""


def discovery() -> dict[str, dict[str, Any]]:
    """Path -> answer, of all that tells which kinds there are."""
    groups = [version for version in KINDS if "/" in version]
    answers: dict[str, dict[str, Any]] = {
        "/version": {"major": "1", "minor": "30", "gitVersion": "v1.30.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {
            "kind": "APIGroupList",
            "groups": [
                {
                    "name": version.partition("/")[0],
                    "versions": [{"groupVersion": version, "version": version.partition("/")[2]}],
                }
                for version in groups
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
def api_with(*objects: Object) -> Iterator[str]:
    """The address of an API in which namespace `there` has these objects of release impala."""
    answers = discovery()
    for each in objects:
        version, name = each["apiVersion"], each["metadata"]["name"]
        metadata = {
            "name": name,
            "namespace": "there",
            # Whose it is: helm does not take over what it has not made.
            "labels": {"app.kubernetes.io/managed-by": "Helm"},
            "annotations": {"meta.helm.sh/release-name": "impala", "meta.helm.sh/release-namespace": "there"},
        }
        root = f"/apis/{version}" if "/" in version else f"/api/{version}"
        path = f"{root}/namespaces/there/{each['kind'].lower()}s/{name}"
        answers[path] = {**each, "metadata": metadata}

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


def render_beside(*objects: Object, arguments: Sequence[str] = ()) -> list[Object]:
    """What an upgrade renders in a cluster that has these."""
    with api_with(*objects) as address:
        done = helm(
            *("template", "impala", str(CHART), "--namespace", "there", *arguments),
            *("--dry-run=server", "--disable-openapi-validation", "--kube-apiserver", address),
        )
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]
