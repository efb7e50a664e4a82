# SPDX-License-Identifier: Apache-2.0
"""Checks every prompt as the engine gets it, and computes what pruning saves of it."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreRequest

from himap_vllm.config import EngineSettings
from himap_vllm.plan.prompt import PromptPlan
from himap_vllm.plan.requests import image_tokens, stage_layers
from himap_vllm.plan.savings import DecoderShape, prompt_savings

from .errors import Reason
from .record import current

# Names of the tokens that embeddings replace, in configurations of vLLM's models. The gateway takes
# no video, so a prompt may have none of its tokens.
_MEDIA_TOKEN_ID = ("image_token_index", "image_token_id", "video_token_index", "video_token_id")


class PromptObserver:
    """Admission's second step: refuses prompts, and writes the others' savings into the record."""

    def __init__(
        self, vllm_config: VllmConfig, settings: EngineSettings, max_prompt_tokens: int | None
    ) -> None:
        model = vllm_config.model_config
        text = model.hf_text_config
        self._layers = stage_layers(settings, model)
        self._shape = DecoderShape(
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_size=model.get_head_size(),
        )
        self._media_ids = _media_token_ids(model.hf_config)
        self._max_tokens = max_prompt_tokens

    def observe(self, request: EngineCoreRequest, plan: PromptPlan | None) -> None:
        """See `himap_vllm.frontend.admission.SecondStep`.

        Raises:
            VLLMValidationError: HTTP 400.
        """
        record = current.get(None)
        if record is None:
            return
        tokens = request.prompt_token_ids or []
        # A later step of a beam search has the same prompt, and what was generated.
        is_step = record.beam_search and record.prompt_tokens > 0
        counts = [image.count for image in image_tokens(request.mm_features) if image.count]
        count = sum(counts)
        if not is_step:
            record.prompt_tokens += len(tokens)
            record.image_tokens += count
        if self._max_tokens is not None and len(tokens) > self._max_tokens and not is_step:
            record.reason = Reason.PROMPT_TOKENS
            raise VLLMValidationError(
                f"this prompt has {len(tokens)} tokens, image tokens included; this server takes "
                f"at most {self._max_tokens}",
                parameter="prompt",
            )
        # However a client wrote it, in a text or as a token id, vLLM takes it for an image, which
        # ended the worker in CVE-2026-44222.
        if sum(tokens.count(token) for token in self._media_ids) > count:
            record.reason = Reason.PLACEHOLDER
            raise VLLMValidationError(
                "this prompt has image tokens that belong to no image; send images as image_url "
                "parts",
                parameter="prompt",
            )
        if counts and not is_step:
            record.savings.append(
                prompt_savings(len(tokens), counts, plan, self._layers, self._shape)
            )


def placeholder_tokens(engine: Any) -> frozenset[str]:
    """Texts that stand for an image in prompts of this model.

    * `vllm.model_executor.models.interfaces.SupportsMultiModal.get_placeholder_str` (called): it is
      the text that vLLM's chat parser writes for an image, and that the tokenizer turns into the
      tokens of `_MEDIA_TOKEN_ID`. Clients may send neither. Remove when: vLLM refuses both itself.
    """
    from vllm.model_executor.model_loader import get_model_cls

    config = engine.vllm_config.model_config
    tokenizer = engine.renderer.get_tokenizer()
    placeholder = get_model_cls(config).get_placeholder_str("image", 1)
    ids = set(_media_token_ids(config.hf_config))
    if placeholder:
        encoded = tokenizer.encode(placeholder, add_special_tokens=False)
        ids.update(token for token in encoded if token in tokenizer.all_special_ids)
    tokens = {str(token) for token in tokenizer.convert_ids_to_tokens(sorted(ids))}
    return frozenset(tokens | {placeholder} if placeholder else tokens)


def _media_token_ids(hf_config: Any) -> tuple[int, ...]:
    values = {getattr(hf_config, name, None) for name in _MEDIA_TOKEN_ID}
    return tuple(value for value in values if isinstance(value, int))
