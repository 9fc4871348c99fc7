"""How long a new version takes to reach all clients, from records that are written down here."""

from __future__ import annotations

import math

import pytest

from benchmarks.fleet_figures import Sample, figures_of, growth, memory_of, spread, told_together
from benchmarks.swarm import Record


def client(number: int, *versions: tuple[float, int]) -> Record:
    return Record(name=f"fleet-{number}", versions=list(versions))


def test_the_clock_of_a_version_starts_when_it_was_published() -> None:
    records = [client(n, (10.0 + n, 1)) for n in range(1, 5)]
    found = spread(records, {1: 10.0}, (0.0, 100.0))
    assert found == {"50": 2.0, "99": 4.0, "100": 4.0}


def test_without_a_publisher_the_clock_starts_with_the_first_client() -> None:
    records = [client(0, (10.5, 1)), client(1, (11.0, 1))]
    assert spread(records, None, (0.0, 100.0)) == {"50": 0.0, "99": 0.5, "100": 0.5}


def test_a_client_that_skips_a_version_holds_it_when_it_has_a_newer_one() -> None:
    records = [client(0, (10.0, 1), (20.0, 2)), client(1, (20.25, 2))]
    assert spread(records, {1: 10.0}, (0.0, 100.0))["100"] == 10.25


def test_a_client_that_never_gets_it_is_not_left_out() -> None:
    records = [client(0, (10.0, 1)), client(1)]
    found = spread(records, {1: 10.0}, (0.0, 100.0))
    assert found["50"] == 0.0
    assert found["100"] == math.inf


def test_figures_are_medians_over_the_versions_of_the_window() -> None:
    late = {1: 1.0, 2: 3.0, 3: 2.0, 9: 50.0}
    records = [client(0, *((10.0 * version + s, version) for version, s in late.items()))]
    published = {version: 10.0 * version for version in late}
    assert spread(records, published, (5.0, 35.0))["100"] == 2.0
    assert math.isnan(spread(records, published, (70.0, 80.0))["100"])


def test_rates_are_of_the_window_and_refusals_of_the_whole_time() -> None:
    def sample(time_s: float, sent: float, refused: float, seats: float) -> Sample:
        series = {
            "impala_paramserver_sent_bytes_total": sent,
            'impala_auth_failures_total{reason="handshake"}': refused,
            'impala_auth_failures_total{reason="unknown_key"}': 2 * refused,
            "impala_paramserver_seats": seats,
            "process_resident_memory_bytes": sent,
        }
        return Sample(time_s, {"paramserver": series})

    seated = Record(name="a", answered_s=1.0, seated_s=1.0, weights_s=3.0)
    late = Record(name="b", answered_s=1.0, seated_s=1.0, weights_s=12.0)
    refused = Record(name="c")
    figures = figures_of(
        samples=[sample(0, 0, 0, 0), sample(10, 5e6, 1, 2), sample(20, 25e6, 1, 2), sample(30, 1e6, 4, 0)],
        records=[seated, late, refused],
        published={},
        connected_s=1.0,
        window_s=(10.0, 20.0),
        clients_cpu_s=0.0,
    )
    assert figures["paramserver_mb_per_s"] == 2.0
    assert figures["paramserver_auth_failures"] == 12
    assert figures["paramserver_rss_mb_peak"] == 25
    assert (figures["clients"], figures["answered"], figures["served"]) == (3, 2, 1)
    assert (figures["seats_held"], figures["seats_after_goodbyes"]) == (2, 0)
    assert figures["ready_50_s"] == pytest.approx(11.0)
    assert figures["ready_100_s"] == math.inf


def test_relays_are_told_as_if_they_were_one() -> None:
    told = told_together({"paramserver": {"a": 1.0}, "relay-0": {"a": 2.0, "b": 3.0}, "relay-1": {"a": 4.0}})
    assert told == {"paramserver": {"a": 1.0}, "relays": {"a": 6.0, "b": 3.0}}
    assert told_together({"paramserver": {}}) == {"paramserver": {}}


def test_memory_is_that_of_the_window_and_a_missing_answer_is_no_memory() -> None:
    def sample(time_s: float, rss: float) -> Sample:
        return Sample(time_s, {"learner": {"process_resident_memory_bytes": rss} if rss else {}})

    samples = [sample(9, 1e6), sample(10, 2e6), sample(11, 0), sample(12.5, 3e6), sample(21, 4e6)]
    assert memory_of(samples, (10.0, 20.0)) == {"learner": [(0.0, 2.0), (2.5, 3.0)]}


def test_growth_is_that_of_the_second_half() -> None:
    begins_and_stays = [(float(s), min(s, 20) * 10.0) for s in range(61)]
    assert growth(begins_and_stays) == pytest.approx(0.0, abs=1e-9)
    leaks = [(float(s), 100 + 0.5 * s) for s in range(61)]
    assert growth(leaks) == pytest.approx(30.0)
    assert math.isnan(growth([(0.0, 1.0)]))
