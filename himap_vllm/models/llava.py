# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 (vllm.model_executor.models.llava): one run of image tokens per image."""

from __future__ import annotations

from himap_vllm.models.family import Family

LLAVA = Family(
    architecture="LlavaForConditionalGeneration",
    decoders=("llama",),
    decoder=lambda model: model.language_model.model,
)
