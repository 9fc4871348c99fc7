"""The commands as they are typed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services import cli
from tests.conftest import needs_package
from tests.unit.cluster.fake_api import FakeApi, deployment, write_kubeconfig


@pytest.fixture
def api() -> Iterator[FakeApi]:
    api = FakeApi()
    for kind in ("pods", "deployments", "statefulsets"):
        api.lists(kind, [])
    yield api
    api.close()


def typed(api: FakeApi, directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """As a process, because Kubernetes' client reads KUBECONFIG once."""
    write_kubeconfig(directory / "kubeconfig", api.url)
    return subprocess.run(
        [sys.executable, "-m", "services.cli", *words],
        env={**os.environ, "KUBECONFIG": str(directory / "kubeconfig")},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@needs_package("kubernetes")
def test_status_of_the_only_release(api: FakeApi, tmp_path: Path) -> None:
    api.lists("deployments", [deployment("actor", 8, 5)])
    result = typed(api, tmp_path, "status", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    read = json.loads(result.stdout)
    assert (read["namespace"], read["release"], read["state"]) == ("lab", "demo", "unknown")
    assert read["roles"] == [{"role": "actor", "desired": 8, "ready": 5, "restarts": 0, "is_settled": True}]


@pytest.fixture
def kubeconfig(api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For commands in this process, where the client has been imported long ago."""
    from kubernetes.config import kube_config

    write_kubeconfig(tmp_path / "kubeconfig", api.url)
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))


@needs_package("kubernetes")
@pytest.mark.usefixtures("kubeconfig", "own_logging")
def test_waiting_for_pods_ends_with_the_exit_code_that_scripts_rely_on(
    api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    api.lists("deployments", [deployment("actor", 8, 5)])
    assert cli.main(["wait", "demo", "--for", "ready", "--timeout", "0"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert 'timeout release=demo ready="actor=5/8" timeout_s=0 missing="actor 5 of 8 ready"' in captured.err
    api.lists("deployments", [deployment("actor", 8, 8)])
    assert cli.main(["wait", "--for=ready"]) == 0


@needs_package("kubernetes")
@pytest.mark.usefixtures("kubeconfig", "own_logging")
def test_a_cluster_that_is_away_is_what_wait_ends_with_1_for_and_not_with_2(
    api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("deployments", "statefulsets"):
        api.answers[f"/apis/apps/v1/namespaces/lab/{kind}"] = 503, b"upstream is gone"
    assert cli.main(["wait", "demo", "--timeout", "0"]) == 1
    assert "cannot answer now (HTTP 503): upstream is gone" in capsys.readouterr().err


@needs_package("kubernetes")
@pytest.mark.usefixtures("kubeconfig", "own_logging")
@pytest.mark.parametrize(
    "words", [["status"], ["wait"], ["status", "-n", "lab", "x"], ["wait", "--context", "here", "x"]]
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert captured.err.startswith("impala: no release in namespace lab; ")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["status", "--jsn"], "--jsn: unknown flag; did you mean --json?"),
        (["status", "--xyzzy"], "--xyzzy: unknown flag; allowed are -n, --namespace, --context"),
        (["status", "a", "b"], "b: one release is enough"),
        (["status", "-n"], "-n/--namespace: a value is missing"),
        (["status", "--plain", "--once"], "--plain goes on, --once and --json do not; give one of them"),
        (["wait", "--for", "ever"], "--for = 'ever': allowed are complete and ready"),
        (["wait", "--timeout", "soon"], "--timeout = 'soon': allowed is a number of seconds, at least 0"),
        (["wait", "--timeout=-1"], "--timeout = '-1'"),
        (["wait", "--timeout", "nan"], "--timeout = 'nan'"),
        (["metrics"], "a target is missing: impala metrics ROLE=URL..."),
        (["metrics", "x=http://a"], "'x' is no role"),
        (["metrics", "learner=http://a", "--timout", "1"], "--timout: unknown flag; did you mean --timeout?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert complaint in captured.err


def test_metrics_needs_neither_torch_nor_kubernetes() -> None:
    program = (
        "import sys; from services import cli; "
        "code = cli.main(['metrics', 'learner=http://127.0.0.1:1', '--timeout', '0']); "
        "names = ('torch', 'zmq', 'numpy', 'rich', 'kubernetes'); "
        "heavy = [name for name in names if name in sys.modules]; "
        "sys.exit(str(heavy) if heavy else code)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, "")
    assert result.stdout == "FAILED  learner at 127.0.0.1:1: no answer (Connection refused)\n"
