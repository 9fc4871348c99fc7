"""Named sets of defaults, as a user would write them into a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "impala": {},
    "machado": {
        "env": {
            "sticky_actions": 0.25,
            "full_action_set": True,
            "life_loss_ends_episode": False,
            "noop_max": 0,
        }
    },
    "torchbeast": {
        "unroll_length": 80,
        "batch_size": 8,
        "optimiser": {"learning_rate": 4.8e-4},
        "loss": {"entropy_cost": 6e-4},
    },
    "dmlab30": {
        "tasks": ["dmlab30"],
        "env": {"frame_stack": 1, "frame_height": 72, "frame_width": 96, "color": True},
        "network": {"name": "deep", "lstm": True},
        "unroll_length": 100,
        "total_steps": 2_500_000_000,
        "optimiser": {"learning_rate": 0.00031866995608948655, "rmsprop_epsilon": 0.1},
        "loss": {"entropy_cost": 0.0033391318945337044, "reward_clipping": "soft_asymmetric"},
    },
    "seed-pong": {
        "network": {"name": "deep", "lstm": True},
        "unroll_length": 40,
        "total_steps": 400_000_000,
        "optimiser": {"learning_rate": 3e-4},
    },
    "seed-breakout": {
        "env": {"id": "ALE/Breakout-v5"},
        "network": {"name": "deep", "lstm": True},
        "unroll_length": 40,
        "total_steps": 400_000_000,
        "optimiser": {"learning_rate": 3e-4},
        "loss": {"entropy_cost": 0.1},
    },
}
"""Named defaults. `impala` is the Atari column of Espeholt et al. 2018, which the fields above already hold;
`machado` is the protocol of Machado et al. 2018; `torchbeast` the setting of Kuettler et al. 2019; `dmlab30`
that of Espeholt et al. 2018 for its 30 levels (10 B frames of 4 to a step). `seed-pong` and `seed-breakout`
are long runs with the deep recurrent network."""
