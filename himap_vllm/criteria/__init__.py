# SPDX-License-Identifier: Apache-2.0
"""How the survivors of a cut are chosen: HiMAP, and methods to compare it with at equal budgets.

Each method has its own file. `additional_config["himap"]["criterion"]` names one for both cuts of
an engine, or one for each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from himap_vllm.criteria.criterion import Criterion
from himap_vllm.criteria.debiased import DEBIASED
from himap_vllm.criteria.diversity import DIVERSITY
from himap_vllm.criteria.fastv import FASTV
from himap_vllm.criteria.half import HALF
from himap_vllm.criteria.himap import HIMAP
from himap_vllm.criteria.mixed import MIXED
from himap_vllm.criteria.random import RANDOM
from himap_vllm.criteria.stratified import STRATIFIED
from himap_vllm.criteria.text import TEXT
from himap_vllm.criteria.uniform import UNIFORM

if TYPE_CHECKING:
    from himap_vllm.config import CriterionName

CRITERIA: dict[CriterionName, Criterion] = {
    criterion.name: criterion
    for criterion in (
        HIMAP,
        FASTV,
        RANDOM,
        UNIFORM,
        DIVERSITY,
        MIXED,
        STRATIFIED,
        DEBIASED,
        TEXT,
        HALF,
    )
}
