# SPDX-License-Identifier: Apache-2.0
"""Keep half of the tokens evenly spaced, the rest by the text's attention.

An ensemble of `uniform` and `text`, as FEATHER has one (https://arxiv.org/abs/2412.13180, section
4): the even half covers what no question names, a caption's objects for example. If the number is
odd, attention chooses one more. Meant for the second cut, as "uniform+half".
"""

from __future__ import annotations

import numpy as np
import torch

from himap_vllm.criteria.criterion import Candidates, Criterion
from himap_vllm.criteria.text_rows import text_rows
from himap_vllm.criteria.uniform import evenly_spaced
from himap_vllm.kernels.upload import upload


def _score(candidates: Candidates) -> torch.Tensor:
    assert candidates.attention is not None
    places = [
        tokens.start + evenly_spaced(tokens.stop - tokens.start, keep // 2)
        for tokens, keep in candidates.images
    ]
    (even,) = upload([np.concatenate(places)], candidates.device)
    # Above all that attention chooses, without a wait for what it is.
    ahead = candidates.attention.amax(0, keepdim=True) + 1.0
    return candidates.attention.index_add(0, even, ahead.expand(len(even)))


HALF = Criterion(name="half", score=_score, select_voters=text_rows)
