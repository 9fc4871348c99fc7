"""One process over its lives: when it may start again."""

import pytest

from services.local.pod import Backoff


def test_backoff_doubles_up_to_its_longest() -> None:
    backoff = Backoff()
    delays = [backoff.after_death(alive_s=20.0, now_s=20.0 * death) for death in range(10)]
    assert delays == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 10.0, 10.0]


def test_backoff_starts_anew_after_a_good_minute() -> None:
    backoff = Backoff()
    backoff.after_death(alive_s=1.0, now_s=0.0)
    assert backoff.after_death(alive_s=59.9, now_s=100.0) == 0.4
    assert backoff.after_death(alive_s=60.0, now_s=200.0) == 0.2


@pytest.mark.parametrize(("fifth_s", "gives_up"), [(60.0, True), (60.1, False)])
def test_five_deaths_within_a_minute_are_too_many(fifth_s: float, gives_up: bool) -> None:
    backoff = Backoff()
    for now_s in (0.0, 1.0, 2.0, 3.0):
        assert backoff.after_death(alive_s=1.0, now_s=now_s) is not None
    assert (backoff.after_death(alive_s=1.0, now_s=fifth_s) is None) == gives_up
