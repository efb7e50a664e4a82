# SPDX-License-Identifier: Apache-2.0
"""Model families: what the plugin must know of each beyond vLLM's common interfaces."""

from __future__ import annotations

from himap_vllm.models.family import Family
from himap_vllm.models.llava import LLAVA

FAMILIES: dict[str, Family] = {family.architecture: family for family in (LLAVA,)}
