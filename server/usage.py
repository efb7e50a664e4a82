# SPDX-License-Identifier: Apache-2.0
"""`usage.himap`: what pruning did to a request's prompts, added to the answer.

Admission tells the plan of each prompt when it enters the engine; the handlers of vLLM know
nothing of it, so the plans are kept here until the answer goes out.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreRequest

from himap_vllm.budget import PromptPlan
from himap_vllm.config import EngineSettings
from himap_vllm.plans import image_tokens, stage_layers
from himap_vllm.savings import DecoderShape, PromptSavings, prompt_savings


class UsageLedger:
    """Savings of the prompts of running requests, by the engine's request id."""

    def __init__(self, vllm_config: VllmConfig, settings: EngineSettings) -> None:
        text = vllm_config.model_config.hf_text_config
        self._layers = stage_layers(settings, vllm_config.model_config)
        self._shape = DecoderShape(
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_size=vllm_config.model_config.get_head_size(),
        )
        self.prunes_by_default = settings.shallow_ratio > 0 or settings.deep_ratio > 0
        self._prompts: dict[str, PromptSavings] = {}

    def record(self, request: EngineCoreRequest, plan: PromptPlan | None) -> None:
        """Admission's observer."""
        images = image_tokens(request.mm_features)
        if images:
            self._prompts[request.request_id] = prompt_savings(
                len(request.prompt_token_ids or ()),
                sum(image.count for image in images),
                plan,
                self._layers,
                self._shape,
            )

    def take(self, request_id: str) -> dict[str, Any] | None:
        """The savings of a request, all its prompts together; None if it had no images."""
        # `record` runs on other threads: look at a copy of the keys.
        ids = [
            key
            for key in list(self._prompts)
            if key == request_id or key.startswith(f"{request_id}-")
        ]
        prompts = [self._prompts.pop(key) for key in ids]
        if not prompts:
            return None
        if len(prompts) == 1:
            return asdict(prompts[0])
        # Weighted by the KV entries, of which FLOPs are nearly a multiple.
        total = {key: sum(asdict(p)[key] for p in prompts) for key in asdict(prompts[0])}
        weight = sum(p.prefill_flops_ratio * p.kv_tokens_unpruned for p in prompts)
        return {**total, "prefill_flops_ratio": weight / total["kv_tokens_unpruned"]}


def add_to_body(body: dict[str, Any], savings: dict[str, Any] | None) -> None:
    """Extend the usage of a complete answer."""
    if savings is not None and body.get("usage"):
        body["usage"]["himap"] = savings


async def add_to_stream(
    events: AsyncIterator[str], ledger: UsageLedger, request_id: str
) -> AsyncIterator[str]:
    """Extend the final usage chunk of a stream of server-sent events, the one without choices."""
    try:
        async for event in events:
            if '"choices":[]' in event and '"usage":{' in event:
                chunk = json.loads(event.removeprefix("data: "))
                add_to_body(chunk, ledger.take(request_id))
                event = f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"
            yield event
    finally:
        ledger.take(request_id)
