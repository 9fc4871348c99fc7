"""The only file that speaks to Kubernetes, through its Python client; others have ``objects.Cluster``.

The client reads kubeconfig with all that may stand in it (certificates, tokens, plugins of cloud providers)
and makes the requests. Metrics come through the API server's proxy, so that a kubeconfig is all one needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yaml import YAMLError

from services.cluster.manifests import error_message, read_pods, read_workloads
from services.cluster.objects import (
    ROLES,
    Cluster,
    ClusterError,
    Pod,
    PodForbiddenError,
    PodSilentError,
    UnreachableError,
    Workload,
)
from services.ops.scrape import MAX_SCRAPE_BYTES

if TYPE_CHECKING:  # an extra, and slow to import
    from kubernetes.client import ApiException

LIST_TIMEOUT_S = (5.0, 30.0)
"""To connect, and between two bytes: the list of a thousand pods is large."""
POD_TIMEOUT_S = (3.0, 4.0)
NUM_CONNECTIONS = 20
NONSENSE = (TypeError, AttributeError, KeyError, ValueError)
"""What the client runs into where a kubeconfig is none: it does not look before it reads."""
LABELS = "app.kubernetes.io/name=impala"


def connect(context: str | None = None, namespace: str | None = None) -> Cluster:
    """Nothing is sent yet. ClusterError if there is no kubeconfig, or no package to read it with."""
    try:
        from kubernetes import client, config
    except ModuleNotFoundError as error:
        raise ClusterError(
            f"the Python package {error.name} is missing; pip install 'impala-kubernetes[cluster]' brings it"
        ) from None
    settings = client.Configuration()
    settings.retries = False  # its own would make every timeout four of them
    settings.connection_pool_maxsize = NUM_CONNECTIONS
    where = Path(config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION).expanduser()
    try:
        contexts, active = config.list_kube_config_contexts()
        by_name = {each["name"]: each for each in contexts}
        if context is None or context in by_name:
            config.load_kube_config(context=context, client_configuration=settings)
    except (config.ConfigException, YAMLError, OSError, *NONSENSE) as error:
        if not where.exists():
            raise ClusterError(
                f"no kubeconfig: {where} is not there; KUBECONFIG names another file"
            ) from None
        raise ClusterError(f"kubeconfig {where} cannot be read: {_reason(error)}") from None
    if context is not None and context not in by_name:
        raise ClusterError(f"--context = {context!r}: allowed are {', '.join(by_name)}")
    chosen = active if context is None else by_name[context]
    api = client.ApiClient(settings)
    return KubernetesCluster(
        client.CoreV1Api(api),
        client.AppsV1Api(api),
        settings.host,
        namespace or chosen["context"].get("namespace") or "default",
    )


class KubernetesCluster:
    """``objects.Cluster`` of a real cluster."""

    def __init__(self, core: Any, apps: Any, host: str, namespace: str) -> None:
        self._core = core
        self._apps = apps
        self._host = host
        self._namespace = namespace

    @property
    def namespace(self) -> str:
        return self._namespace

    def pods(self, release: str, roles: Sequence[str] = ROLES) -> list[Pod]:
        selector = f"{_labels(release)},app.kubernetes.io/component in ({','.join(roles)})"
        return read_pods(self._list(self._core.list_namespaced_pod, selector))

    def workloads(self, release: str | None = None) -> list[Workload]:
        lists = (self._apps.list_namespaced_deployment, self._apps.list_namespaced_stateful_set)
        selector = LABELS if release is None else _labels(release)
        return [workload for each in lists for workload in read_workloads(self._list(each, selector))]

    def _list(self, method: Callable[..., Any], selector: str) -> bytes:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            response = method(
                self._namespace,
                label_selector=selector,
                resource_version="0",  # from the API server's memory, which costs it little
                _preload_content=False,
                _request_timeout=LIST_TIMEOUT_S,
            )
            body: bytes = response.data
        except ApiException as error:
            raise self._refusal(error) from None
        except (HTTPError, OSError) as error:
            raise UnreachableError(f"cluster {self._host} does not answer: {_reason(error)}") from None
        return body

    def metrics(self, pod: Pod) -> str:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            response = self._core.connect_get_namespaced_pod_proxy_with_path(
                f"{pod.name}:{pod.metrics_port}",
                self._namespace,
                "metrics",
                _preload_content=False,
                _request_timeout=POD_TIMEOUT_S,
            )
            body: bytes = response.read(MAX_SCRAPE_BYTES + 1)
            if len(body) > MAX_SCRAPE_BYTES:
                response.close()  # the unread rest would stand before the connection's next answer
            response.release_conn()
        except ApiException as error:
            if error.status in (401, 403):
                raise PodForbiddenError(f"no permission for pods/proxy (HTTP {error.status})") from None
            raise PodSilentError(error_message(error.body) or f"HTTP status {error.status}") from None
        except (HTTPError, OSError) as error:
            raise PodSilentError(_reason(error)) from None
        if len(body) > MAX_SCRAPE_BYTES:
            raise PodSilentError(f"they are longer than {MAX_SCRAPE_BYTES:,} bytes")
        return body.decode(errors="replace")

    def last_log_line(self, pod: Pod) -> str | None:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            response = self._core.read_namespaced_pod_log(
                pod.name,
                self._namespace,
                container=pod.container,
                tail_lines=1,
                limit_bytes=4096,
                _preload_content=False,
                _request_timeout=POD_TIMEOUT_S,
            )
            text: str = response.data.decode(errors="replace")
        except (ApiException, HTTPError, OSError):
            return None
        return text.strip() or None

    def _refusal(self, error: ApiException) -> ClusterError:
        status, message = error.status, error_message(error.body)
        if not status:  # how the client calls what TLS does not like
            return UnreachableError(f"cluster {self._host} does not answer: {_reason(error)}")
        if status == 403:
            return ClusterError(f"no permission: {message}")
        if status == 401:
            return ClusterError(
                f"cluster {self._host} does not accept the credentials of kubeconfig ({message})"
            )
        if status == 429 or status >= 500:
            return UnreachableError(f"cluster {self._host} cannot answer now (HTTP {status}): {message}")
        return ClusterError(f"cluster {self._host} refuses (HTTP {status}): {message}")


def _labels(release: str) -> str:
    return f"{LABELS},app.kubernetes.io/instance={release}"


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "reason", None) or error).split())[:300] or type(error).__name__
