# SPDX-License-Identifier: Apache-2.0
"""Keep half of the tokens evenly spaced, the rest by the text's attention.

An ensemble of `uniform` and `text`: the even half covers what no question names. FEATHER
(https://arxiv.org/abs/2412.13180) joins the two at its early cut. If the number is odd, attention
chooses one more. Meant for the second cut, as "uniform+half".
"""

from __future__ import annotations

import torch

from himap_vllm.criteria.criterion import Candidates, Criterion
from himap_vllm.criteria.text_rows import text_rows
from himap_vllm.criteria.uniform import evenly_spaced


def _score(candidates: Candidates) -> torch.Tensor:
    attention = candidates.attention
    assert attention is not None
    # The even half lies above all that attention chooses, without a wait for what that is.
    return attention + evenly_spaced(candidates, divisor=2) * (attention.amax() + 1.0)


HALF = Criterion(name="half", score=_score, select_voters=text_rows)
