# SPDX-License-Identifier: Apache-2.0
"""Keep evenly spaced tokens of each image, in raster order: the middles of k equal parts."""

from __future__ import annotations

import numpy as np
import torch

from himap_vllm.criteria.criterion import Candidates, Criterion
from himap_vllm.kernels.upload import upload


def _score(candidates: Candidates) -> torch.Tensor:
    chosen = np.zeros(candidates.cut.num_image_tokens, dtype=np.int64)
    for tokens, keep in candidates.images:
        num_tokens = tokens.stop - tokens.start
        chosen[tokens.start + (2 * np.arange(keep) + 1) * num_tokens // (2 * keep)] = 1
    (scores,) = upload([chosen], candidates.device)
    return scores.float()


UNIFORM = Criterion(name="uniform", score=_score)
