"""Kubernetes' own client against an API server of a few paths."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cluster.api import connect
from services.cluster.objects import ClusterError, PodForbiddenError, PodSilentError, UnreachableError
from services.cluster.releases import find_release
from services.ops.scrape import MAX_SCRAPE_BYTES
from tests.conftest import needs_package
from tests.unit.cluster.fake_api import FakeApi, deployment, labels, refusal, write_kubeconfig
from tests.unit.cluster.fake_cluster import FakeCluster, pod, workload

pytestmark = needs_package("kubernetes")

FORBIDDEN = 'pods is forbidden: User "u" cannot list resource "pods" in API group "" in the namespace "lab"'
LISTS = ("/api/v1/namespaces/lab/pods", "/apis/apps/v1/namespaces/lab/deployments")
PROXY = "/api/v1/namespaces/lab/pods/learner-0:9400/proxy/metrics"


@pytest.fixture
def api() -> Iterator[FakeApi]:
    api = FakeApi()
    yield api
    api.close()


@pytest.fixture
def kubeconfig(api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "kubeconfig"
    write_kubeconfig(path, api.url)
    use(path, monkeypatch)
    return path


def use(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client reads KUBECONFIG when it is imported: once in a command, but also once in all tests."""
    from kubernetes.config import kube_config

    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(path))


@pytest.mark.usefixtures("kubeconfig")
def test_a_release_is_read(api: FakeApi) -> None:
    container = {"name": "learner", "ports": [{"name": "metrics", "containerPort": 9400}]}
    api.lists(
        "pods",
        [
            {
                "metadata": {"name": "learner-0", "labels": labels("learner")},
                "spec": {"containers": [container]},
            }
        ],
    )
    api.lists("deployments", [deployment("actor", 8, 7)])
    api.lists("statefulsets", [deployment("learner", 1, 1)])
    api.answers[PROXY] = 200, b"impala_learner_steps 5.0\n"
    cluster = connect()
    assert cluster.namespace == "lab"
    [learner] = cluster.pods("demo")
    assert (learner.name, learner.metrics_port) == ("learner-0", 9400)
    assert [(each.role, each.ready) for each in cluster.workloads()] == [("actor", 7), ("learner", 1)]
    assert cluster.metrics(learner) == "impala_learner_steps 5.0\n"
    of_demo = "app.kubernetes.io/name=impala,app.kubernetes.io/instance=demo"
    all_roles = "(learner,paramserver,relay,actor,evaluator)"
    assert api.selectors[0] == f"{of_demo},app.kubernetes.io/component in {all_roles}"
    assert set(api.selectors[1:]) == {"app.kubernetes.io/name=impala"}
    api.selectors.clear()
    assert [each.role for each in cluster.workloads("demo")] == ["actor", "learner"]
    assert set(api.selectors) == {of_demo}
    api.selectors.clear()
    cluster.pods("demo", ["learner"])
    assert api.selectors == [f"{of_demo},app.kubernetes.io/component in (learner)"]


@pytest.mark.usefixtures("kubeconfig")
@pytest.mark.parametrize(
    ("context", "namespace", "expected"),
    [(None, None, "lab"), ("there", None, "default"), ("there", "mine", "mine"), (None, "mine", "mine")],
)
def test_the_namespace_is_that_of_the_flag_or_of_the_context(
    context: str | None, namespace: str | None, expected: str
) -> None:
    assert connect(context, namespace).namespace == expected


@pytest.mark.usefixtures("kubeconfig")
@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (403, refusal(FORBIDDEN), ClusterError, f"no permission: {FORBIDDEN}"),
        (
            401,
            refusal("Unauthorized"),
            ClusterError,
            "does not accept the credentials of kubeconfig (Unauthorized)",
        ),
        (503, b"upstream is gone", UnreachableError, "cannot answer now (HTTP 503): upstream is gone"),
        (429, refusal("slow down"), UnreachableError, "cannot answer now (HTTP 429): slow down"),
        (400, refusal("bad"), ClusterError, "refuses (HTTP 400): bad"),
    ],
)
def test_what_the_cluster_refuses_is_one_line(
    api: FakeApi, status: int, body: bytes, kind: type[ClusterError], words: str
) -> None:
    api.answers = dict.fromkeys(LISTS, (status, body))
    for ask in (lambda: connect().pods("demo"), lambda: connect().workloads()):
        with pytest.raises(ClusterError) as raised:
            ask()
        assert type(raised.value) is kind
        assert words in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("kubeconfig")
def test_a_pod_that_does_not_answer_is_silent_and_so_is_one_that_nobody_may_ask(api: FakeApi) -> None:
    cluster = connect()
    api.answers[PROXY] = 503, b"error trying to reach service: connection refused"
    with pytest.raises(PodSilentError, match="trying to reach service: connection refused"):
        cluster.metrics(pod("learner-0"))
    for status in (401, 403):
        api.answers[PROXY] = status, refusal("cannot get resource pods/proxy")
        with pytest.raises(PodForbiddenError, match=rf"^no permission for pods/proxy \(HTTP {status}\)$"):
            cluster.metrics(pod("learner-0"))
    del api.answers[PROXY]
    with pytest.raises(PodSilentError, match="not found") as raised:
        cluster.metrics(pod("learner-0"))
    assert not isinstance(raised.value, PodForbiddenError)


@pytest.mark.usefixtures("kubeconfig")
def test_metrics_without_end_are_not_read_and_leave_nothing_to_the_next_request(api: FakeApi) -> None:
    cluster = connect()
    api.answers[PROXY] = 200, b"x" * MAX_SCRAPE_BYTES
    assert len(cluster.metrics(pod("learner-0"))) == MAX_SCRAPE_BYTES
    api.answers[PROXY] = 200, b"x" * (MAX_SCRAPE_BYTES + 10)
    api.first_bytes = MAX_SCRAPE_BYTES + 1
    api.rest_may_follow.clear()
    with pytest.raises(PodSilentError, match="longer than 1,048,576 bytes"):
        cluster.metrics(pod("learner-0"))
    api.answers[PROXY] = 200, b"impala_learner_steps 5.0\n"
    assert cluster.metrics(pod("learner-0")) == "impala_learner_steps 5.0\n"


@pytest.mark.usefixtures("kubeconfig")
def test_the_last_line_of_a_log_is_there_or_none(api: FakeApi) -> None:
    cluster = connect()
    assert cluster.last_log_line(pod("learner-0")) is None
    api.answers["/api/v1/namespaces/lab/pods/learner-0/log"] = 200, b"the last line\n"
    assert cluster.last_log_line(pod("learner-0")) == "the last line"


def test_a_cluster_that_is_not_there_is_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as bound_but_not_listening:
        bound_but_not_listening.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound_but_not_listening.getsockname()[1]}"
        write_kubeconfig(tmp_path / "kubeconfig", url)
        use(tmp_path / "kubeconfig", monkeypatch)
        with pytest.raises(UnreachableError, match=f"cluster {url} does not answer: .*refused"):
            connect().pods("demo")
        with pytest.raises(PodSilentError, match="refused"):
            connect().metrics(pod("learner-0"))


@pytest.mark.usefixtures("kubeconfig")
def test_a_server_without_the_certificate_that_is_asked_for_is_unreachable(
    api: FakeApi, tmp_path: Path
) -> None:
    url = api.url.replace("http:", "https:")
    write_kubeconfig(tmp_path / "kubeconfig", url)
    with pytest.raises(UnreachableError, match=f"cluster {url} does not answer: .+") as raised:
        connect().pods("demo")
    assert "\n" not in str(raised.value)


def test_a_kubeconfig_that_is_missing_empty_or_nonsense_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(tmp_path / "nowhere", monkeypatch)
    with pytest.raises(
        ClusterError, match=r"no kubeconfig: .*nowhere is not there; KUBECONFIG names another"
    ):
        connect()
    for content in ("", "just words", "{}", "a: [1", "contexts: []\ncurrent-context: x\n"):
        (tmp_path / "odd").write_text(content)
        use(tmp_path / "odd", monkeypatch)
        with pytest.raises(ClusterError, match="kubeconfig") as raised:
            connect()
        assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("kubeconfig")
def test_an_unknown_context_is_answered_with_those_there_are() -> None:
    with pytest.raises(ClusterError, match="--context = 'nowhere': allowed are here, there"):
        connect("nowhere")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "kubernetes", None)
    with pytest.raises(
        ClusterError, match=r"kubernetes is missing; pip install 'impala-kubernetes\[cluster\]'"
    ):
        connect()


@pytest.mark.parametrize(
    ("releases", "name", "complaint"),
    [
        ([], None, "no release in namespace lab"),
        ([], "demo", "no release in namespace lab"),
        (["a", "b"], None, "2 releases in namespace lab; name one of a, b"),
        (["a", "b"], "c", "no release 'c' in namespace lab; there is a, b"),
    ],
)
def test_which_release_is_meant_must_be_clear(releases: list[str], name: str | None, complaint: str) -> None:
    cluster = FakeCluster([], [workload("learner", release=each) for each in releases])
    with pytest.raises(ClusterError, match=complaint):
        find_release(cluster, name)


def test_the_only_release_needs_no_name_and_one_of_several_does() -> None:
    only = FakeCluster([], [workload("learner", release="a"), workload("actor", release="a")])
    assert find_release(only, None) == "a"
    several = FakeCluster([], [workload("learner", release=each) for each in ("a", "b")])
    assert find_release(several, "b") == "b"
