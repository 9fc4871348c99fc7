"""The one form of image observations: uint8 (H, W) in gray, (H, W, 3) with env.color.

Suites whose emulators do not make it themselves call ``to_frame``. Stacking comes later, elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from services.config import EnvConfig
from services.rl.envs.base import Observations


def frame_shape(config: EnvConfig) -> tuple[int, ...]:
    """Of one frame of one environment."""
    size = (config.frame_height, config.frame_width)
    return (*size, 3) if config.color else size


def to_frame(image: Any, config: EnvConfig) -> Observations:
    """An image (H, W), (H, W, 1) or RGB (H, W, 3) as the configuration wants it, resized by area."""
    import cv2  # takes longer to import than everything else here, and only images need it

    cv2.setNumThreads(1)  # the actor's processors are spoken for
    image = np.asarray(image)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if config.color and image.ndim == 2:
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    elif not config.color and image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    size = (config.frame_width, config.frame_height)
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
