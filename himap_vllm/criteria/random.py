# SPDX-License-Identifier: Apache-2.0
"""Keep random tokens: the baseline that a criterion must beat.

The seed is a checksum of the token ids up to the end of an image's unit, so the same prompt loses
the same places on every rank and in every run. The content of its images has no influence.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from himap_vllm.criteria.criterion import Candidates, Criterion
from himap_vllm.kernels.upload import upload


def prompt_seed(token_ids: Sequence[int] | npt.NDArray[np.int64]) -> int:
    """CRC-32 of the ids as little-endian 64-bit integers."""
    return zlib.crc32(np.asarray(token_ids, dtype="<i8").tobytes())


def _score(candidates: Candidates) -> torch.Tensor:
    ranks = np.empty(candidates.cut.num_image_tokens, dtype=np.int64)
    for unit in candidates.cut.units:
        own = unit.image_tokens
        draws = np.random.default_rng((unit.seed, candidates.index))
        ranks[own] = draws.permutation(own.stop - own.start)
    (scores,) = upload([ranks], candidates.device)
    return scores.float()


RANDOM = Criterion(name="random", score=_score, seeded=True)
