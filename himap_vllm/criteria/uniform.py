# SPDX-License-Identifier: Apache-2.0
"""Keep evenly spaced tokens of each image, in raster order: the middles of k equal parts."""

from __future__ import annotations

import numpy as np
import torch

from himap_vllm.criteria.criterion import Candidates, Criterion
from himap_vllm.kernels.upload import upload
from himap_vllm.plan.voters import IntArray


def evenly_spaced(num_tokens: int, count: int) -> IntArray:
    """[count] the middles of `count` equal parts of `num_tokens`, ascending."""
    return (2 * np.arange(count, dtype=np.int64) + 1) * num_tokens // (2 * max(1, count))


def _score(candidates: Candidates) -> torch.Tensor:
    chosen = np.zeros(candidates.cut.num_image_tokens, dtype=np.int64)
    for tokens, keep in candidates.images:
        chosen[tokens.start + evenly_spaced(tokens.stop - tokens.start, keep)] = 1
    (scores,) = upload([chosen], candidates.device)
    return scores.float()


UNIFORM = Criterion(name="uniform", score=_score)
