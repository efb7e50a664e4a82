# SPDX-License-Identifier: Apache-2.0
"""Keep the tokens that get more attention than others do at their place in the image.

Attention depends on the place of a token as much as on what it shows. D2Pruner
(https://arxiv.org/abs/2512.19443) divides it by a positional prior that is measured beforehand, and
so does this: the prior is the mean over other images (`himap calibrate`). Text rows vote at both
cuts, as `text_rows` has it, because the prior of HiMAP's second voters, the surviving tokens
themselves, would depend on which survived.
"""

from __future__ import annotations

import torch

from himap_vllm.criteria.criterion import Candidates, Criterion
from himap_vllm.criteria.text_rows import text_rows


def _score(candidates: Candidates) -> torch.Tensor:
    assert candidates.attention is not None
    assert candidates.prior is not None
    return candidates.attention / candidates.prior


DEBIASED = Criterion(name="debiased", score=_score, select_voters=text_rows, needs_prior=True)
