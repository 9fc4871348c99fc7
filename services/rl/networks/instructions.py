"""Reads an instruction: hashed words -> embedding -> LSTM (the language levels of Espeholt et al. 2018).

Ids come from ``envs.instructions``; 0 is no word. The feature is the LSTM's output at the last word, and
zeros for an instruction of none. Shapes: N observations, W words.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from services.rl.envs.instructions import NUM_WORDS

EMBEDDING_SIZE = 20
NUM_FEATURES = 64


class InstructionEncoder(nn.Module):
    """[N, W] -> [N, NUM_FEATURES]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_WORDS, EMBEDDING_SIZE)
        self.lstm = nn.LSTM(EMBEDDING_SIZE, NUM_FEATURES, batch_first=True)
        self.num_features = NUM_FEATURES

    def forward(self, words_NW: Tensor) -> Tensor:
        words_NW = words_NW.long()
        output_NWF, _ = self.lstm(self.embedding(words_NW))
        num_words_N = (words_NW != 0).sum(1)
        rows_N = torch.arange(len(words_NW), device=words_NW.device)
        last_NF = output_NWF[rows_N, (num_words_N - 1).clamp(min=0)]
        features_NF: Tensor = last_NF * (num_words_N > 0).unsqueeze(-1)
        return features_NF
