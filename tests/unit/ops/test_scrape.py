"""Reading metrics: the text, the differences, and pods that do not answer."""

import socket
import threading
from collections.abc import Iterator, Mapping

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from services.ops.health import HealthServer, Heartbeat
from services.ops.metrics import ROLES, LearnerMetrics
from services.ops.scrape import Scrape, Scraper, fetch, increases, parse_metrics
from tests.unit.learner.waiting import until


def scrape(time_s: float, samples: Mapping[str, float]) -> Scrape:
    return Scrape(time_s=time_s, samples=samples)


@pytest.mark.parametrize("role", ROLES)
def test_everything_that_the_official_library_exposes_is_read_back(role: str) -> None:
    registry = CollectorRegistry()
    ROLES[role](registry)
    samples = parse_metrics(generate_latest(registry).decode())
    exposed = [sample for family in registry.collect() for sample in family.samples]
    assert len(samples) == len(exposed)
    for sample in exposed:
        assert scrape(0, samples).get(sample.name, **sample.labels) is not None, sample


def test_lines_that_are_no_samples_are_skipped() -> None:
    assert parse_metrics("# HELP a b\n\nnonsense\na one\nb NaN 7\na 1.5e3\n<html> 404") == {
        "a": 1500.0,
        "b NaN": 7.0,
        "<html>": 404.0,
    }


def test_series_of_a_metric_are_found_by_its_label() -> None:
    values = {'loss{term="total"}': 1.5, 'loss{term="policy"}': 0.5, 'loss_scale{term="x"}': 9.0, "loss": 3.0}
    assert scrape(0, values).by_label("loss", "term") == {"total": 1.5, "policy": 0.5}


def test_an_increase_is_a_difference_or_a_rate() -> None:
    increase = increases(scrape(10, {"n": 100, 'k{a="b"}': 1}), scrape(14, {"n": 120, 'k{a="b"}': 1}))
    assert increase("n") == 20
    assert increase("n", per_second=True) == 5
    assert increase("k", a="b") == 0
    assert increase("missing") is None


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (None, scrape(1, {"n": 5})),
        (scrape(1, {"n": 5}), scrape(1, {"n": 5})),
        (scrape(0, {"n": 5}), scrape(1, {"n": 4})),
        (
            scrape(0, {"n": 5, "process_start_time_seconds": 1}),
            scrape(1, {"n": 6, "process_start_time_seconds": 2}),
        ),
    ],
    ids=["one scrape", "no time between", "counter fell", "process restarted"],
)
def test_an_increase_that_cannot_be_known_is_none(before: Scrape | None, now: Scrape) -> None:
    assert increases(before, now)("n") is None


def test_a_pod_that_is_not_there_is_no_answer() -> None:
    with socket.socket() as bound_but_not_listening:
        bound_but_not_listening.bind(("127.0.0.1", 0))
        assert fetch(bound_but_not_listening.getsockname()[1], timeout_s=5.0) is None


def test_a_pod_that_is_frozen_is_no_answer_after_the_timeout() -> None:
    with socket.socket() as frozen:
        frozen.bind(("127.0.0.1", 0))
        frozen.listen()
        assert fetch(frozen.getsockname()[1], timeout_s=0.05) is None


def test_a_pod_that_says_anything_but_metrics_is_no_answer() -> None:
    server = HealthServer("127.0.0.1", 0, CollectorRegistry(), Heartbeat(), 60.0, lambda: None)
    assert fetch(server.port, path="/nothing", timeout_s=5.0) is None
    server.close()


def test_a_scraper_has_the_latest_of_those_that_answer_while_others_are_frozen() -> None:
    class AskedTwice(Collector):
        """Tells when a thread asks again."""

        def __init__(self) -> None:
            self.times = -1  # registering asks, too
            self.event = threading.Event()

        def collect(self) -> Iterator[Metric]:
            self.times += 1
            if self.times == 2:
                self.event.set()
            yield from ()

    registry = CollectorRegistry()
    LearnerMetrics(registry).updates.inc(3)
    asked_twice = AskedTwice()
    registry.register(asked_twice)
    server = HealthServer("127.0.0.1", 0, registry, Heartbeat(), 60.0, lambda: None)
    with socket.socket() as frozen:
        frozen.bind(("127.0.0.1", 0))
        frozen.listen()
        scraper = Scraper({"learner": server.port, "actor-0": frozen.getsockname()[1]}, interval_s=0.01)
        assert asked_twice.event.wait(20)
        until(lambda: "learner" in scraper.latest())  # an answer that came too late is asked for again
        latest = scraper.latest()
        scraper.close()
    server.close()
    assert list(latest) == ["learner"]
    assert latest["learner"].get("impala_learner_updates_total") == 3
