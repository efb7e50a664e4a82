# SPDX-License-Identifier: Apache-2.0
"""How many tokens a step holds: by default the model's largest image and the text of its turn.

Pruning computes a turn, from its first image on, in one step. vLLM's own default is 2,048 tokens
on many GPUs, less than one large photo has in models of dynamic resolution.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from typing_extensions import override
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.encoder_budget import get_mm_max_toks_per_item
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_num_threads

if TYPE_CHECKING:
    from vllm.config import ModelConfig

logger = logging.getLogger("vllm.himap.server")

TEXT_TOKENS = 1024
"""Of a turn, beside its largest image."""
_LARGE_DEVICE_BYTES = 40 << 30
_MOST = 20_480  # tokens; activations of a 7B model take some 2 GB then
_MOST_ELSEWHERE = 8_192  # on a CPU, and on smaller cards


def step_tokens(default: int, turn: int, sequences: int, most: int) -> int:
    """Tokens of a step.

    Args:
        default: vLLM's.
        turn: tokens of the largest image and its text.
        sequences: that may decode in the same step, a token each.
        most: that memory allows.
    """
    return max(default, min(turn + sequences, most))


class EngineArgs(AsyncEngineArgs):
    """vLLM's, with steps that hold the model's largest image unless the operator chose their size.

    * `vllm.engine.arg_utils.EngineArgs._set_default_max_num_seqs_and_batched_tokens_args`
      (overridden): vLLM raises the default there, too, for models that can't split an image.
      Remove when: vLLM's default holds a model's largest image.
    """

    @override
    def _set_default_max_num_seqs_and_batched_tokens_args(
        self, usage_context: Any, model_config: ModelConfig, *args: Any, **kwargs: Any
    ) -> None:
        own: Any = self  # mypy finds no type for what vLLM's class reassigns
        chosen = own.max_num_batched_tokens is not None
        super()._set_default_max_num_seqs_and_batched_tokens_args(
            usage_context, model_config, *args, **kwargs
        )
        image, longest = _largest_image(model_config), model_config.max_model_len
        if image is None:
            return
        if not chosen:
            default, sequences = own.max_num_batched_tokens, own.max_num_seqs
            most = min(_most(), sequences * longest)  # the latter as in vLLM
            size = step_tokens(default, min(image + TEXT_TOKENS, longest), sequences, most)
            if size > default:
                logger.info(
                    "a step holds %d tokens (--max-num-batched-tokens) instead of %d: the model's "
                    "largest image has %d",
                    size,
                    default,
                    image,
                )
            own.max_num_batched_tokens = size
        limits = (
            own.max_num_batched_tokens,
            own.max_num_scheduled_tokens,
            own.long_prefill_token_threshold,
        )
        limit = min(filter(None, limits))
        if min(image, longest) >= limit:
            logger.warning(
                "the model's largest image has %d tokens, and a prompt %d in a step "
                "(--max-num-batched-tokens): a turn that has more tokens from its first image on "
                "is not pruned",
                image,
                limit,
            )


def _largest_image(model_config: ModelConfig) -> int | None:
    """Tokens of the largest image that the model's processor makes; None: it takes none.

    * `vllm.multimodal.registry.MultiModalRegistry.create_processor`,
      `vllm.multimodal.encoder_budget.get_mm_max_toks_per_item` (called): what vLLM sizes its
      encoder cache by. Remove when: vLLM's default holds a model's largest image.
    """
    if not model_config.is_multimodal_model:
        return None
    try:
        with set_default_torch_num_threads():  # as vLLM does there
            processor = MULTIMODAL_REGISTRY.create_processor(model_config)
            if not processor.info.allowed_mm_limits.get("image"):
                return None
            found = get_mm_max_toks_per_item(processor, {"image": 1}, cache=None)
    except Exception as error:  # the engine fails in words of its own, if it does
        logger.debug("the model's largest image is not known: %r", error)
        return None
    image: int | None = found.get("image")
    return image


def _most() -> int:
    """Tokens of a step for whose activations there is memory."""
    if current_platform.is_cpu():
        return _MOST_ELSEWHERE
    large = current_platform.get_device_total_memory() >= _LARGE_DEVICE_BYTES
    return _MOST if large else _MOST_ELSEWHERE
