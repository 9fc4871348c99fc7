"""What somebody who misspelt a name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any


def suggest(wrong: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """A hint at the end of an error message: close names, or all of them if they are few."""
    names = list(known)
    close = difflib.get_close_matches(wrong, names, n=3, cutoff=0.6)
    if not close:  # the right name under the wrong section, or the other way round
        last = wrong.rpartition(".")[2]
        close = [name for name in names if name.rpartition(".")[2] == last][:3]
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"allowed are {', '.join(names)}" if len(names) < 20 else "`impala config --help` lists all"
