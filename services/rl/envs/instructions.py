"""Instructions in words, as numbers: what an environment says -> the ids that the network embeds.

A word's id is a hash, as in the agents of Espeholt et al. 2018, so there is no vocabulary to collect or to
ship; of two words one in a thousand pairs shares an id. The hash is CRC-32, because all actors must agree on
it and a checkpoint relies on it (Python's own differs between processes).
"""

from __future__ import annotations

import re
import zlib

import numpy as np
import numpy.typing as npt

NUM_WORDS = 1000
"""Ids are 1 ... NUM_WORDS - 1; 0 is no word."""
INSTRUCTION_LENGTH = 16
"""Words that an instruction may have; more are cut off."""

_WORD = re.compile(r"\w+")


def hash_words(text: str, length: int = INSTRUCTION_LENGTH) -> npt.NDArray[np.int32]:
    """[length] ids of the words, whatever their case and punctuation, then zeros."""
    ids = np.zeros(length, np.int32)
    for i, word in enumerate(_WORD.findall(text.lower())[:length]):
        ids[i] = 1 + zlib.crc32(word.encode()) % (NUM_WORDS - 1)
    return ids
