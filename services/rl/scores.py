"""Scores on a scale that games share: 0 is a random player, 100 a human one, in percent.

The tables in ``data`` name their sources. The tasks that are reported together, and the level that each is
evaluated on, come from the same tables. Reports and evaluation come after this; nothing here plays, or
imports what plays.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Human-normalised scores over tasks. Capped: no task counts for more than 100."""

    mean: float
    median: float
    mean_capped: float
    median_capped: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    random: float
    human: float
    test_level: str = ""


def _read(file: str) -> Any:
    return json.loads((resources.files("services.rl") / "data" / file).read_text(encoding="utf-8"))


def _entry(scores: Mapping[str, Any]) -> _Entry:
    return _Entry(random=scores["random"], human=scores["human"], test_level=scores.get("test", ""))


_GAMES = _read("atari57.json")["games"]
_LEVELS = _read("dmlab30.json")["levels"]

SCORE_TABLES: Mapping[str, tuple[str, ...]] = {
    "atari57": tuple(f"ALE/{game.title().replace('_', '')}-v5" for game in _GAMES),
    "dmlab30": tuple(f"dmlab/{level['train']}" for level in _LEVELS),
}
"""The tasks of each, to train on: ids as ``env.id`` spells them."""

_ATARI = {game.replace("_", ""): _entry(scores) for game, scores in _GAMES.items()}
_DMLAB = {level[key]: _entry(level) for level in _LEVELS for key in ("train", "test")}

_ATARI_SPELLING = re.compile(r"(?:ALE/)?(?P<game>\w+?)(?:NoFrameskip|Deterministic)?(?:-v[045])?")
"""The spellings of ``envs.atari``."""
_DMLAB_SPELLING = re.compile(r"(?P<prefix>(?:dmlab/)?(?:contributed/dmlab30/)?)(?P<level>\w+)")


def evaluation_task(task_id: str) -> str:
    """The id that training on ``task_id`` is evaluated on: the same, but for two levels of DMLab."""
    spelling = _DMLAB_SPELLING.fullmatch(task_id)
    if spelling is None or spelling["level"] not in _DMLAB:
        return task_id
    return spelling["prefix"] + _DMLAB[spelling["level"]].test_level


def human_normalised(task_id: str, score: float) -> float | None:
    """The score in percent of the way from random to human, uncapped; None without an entry."""
    entry = _find(task_id)
    return None if entry is None else 100.0 * (score - entry.random) / (entry.human - entry.random)


def summarise(scores: Sequence[float | None]) -> Summary | None:
    """Over the human-normalised scores of several tasks; None unless every one of them has one."""
    known = [score for score in scores if score is not None]
    if len(scores) < 2 or len(known) < len(scores):
        return None
    capped = [min(100.0, score) for score in known]
    return Summary(
        mean=statistics.fmean(known),
        median=statistics.median(known),
        mean_capped=statistics.fmean(capped),
        median_capped=statistics.median(capped),
    )


def _find(task_id: str) -> _Entry | None:
    level = _DMLAB_SPELLING.fullmatch(task_id)
    if level is not None and level["level"] in _DMLAB:
        return _DMLAB[level["level"]]
    game = _ATARI_SPELLING.fullmatch(task_id)
    return _ATARI.get(game["game"].replace("_", "").lower()) if game else None
