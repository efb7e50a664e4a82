# SPDX-License-Identifier: Apache-2.0
"""Keep evenly spaced tokens of each image, in raster order: the middles of k equal parts."""

from __future__ import annotations

import numpy as np
import torch

from himap_vllm.criteria.criterion import Candidates, Criterion
from himap_vllm.kernels.upload import upload


def evenly_spaced(candidates: Candidates, divisor: int = 1) -> torch.Tensor:
    """[num flat images] float32: 1 for evenly spaced tokens of each image, 0 for the others.

    Of an image that keeps k tokens these are the middles of floor(k / divisor) equal parts.
    """
    chosen = np.zeros(candidates.cut.num_image_tokens, dtype=np.int64)
    for tokens, keep in candidates.images:
        parts = keep // divisor
        middles = (2 * np.arange(parts) + 1) * (tokens.stop - tokens.start) // max(1, 2 * parts)
        chosen[tokens.start + middles] = 1
    (spaced,) = upload([chosen], candidates.device)
    return spaced.float()


UNIFORM = Criterion(name="uniform", score=evenly_spaced)
