# SPDX-License-Identifier: Apache-2.0
"""vLLM's features that do not go together with pruning yet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import vllm.envs as envs
from vllm.config import VllmConfig

from himap_vllm.config import HiMAPError


class _Feature(NamedTuple):
    """The parameter that turns it on, whether it is on, its name, why it is refused."""

    parameter: str
    present: bool
    name: str
    reason: str


def check_features(vllm_config: VllmConfig) -> None:
    """Raise HiMAPError if a feature is on that does not go together with pruning."""
    for features in (_parallelism, _caches, _steps, _modes):
        for feature in features(vllm_config):
            if feature.present:
                raise HiMAPError(
                    feature.parameter,
                    f"himap can't be combined with {feature.name} yet: {feature.reason}",
                )


def _parallelism(vllm_config: VllmConfig) -> Iterator[_Feature]:
    parallel = vllm_config.parallel_config
    yield _Feature(
        "pipeline_parallel_size",
        parallel.pipeline_parallel_size > 1,
        "pipeline parallelism",
        "the cuts lie inside one worker's layers",
    )
    yield _Feature(
        "decode_context_parallel_size",
        parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "context parallelism",
        "a score needs all rows of a prompt on one worker",
    )
    yield _Feature(
        "enable_dbo",
        parallel.use_ubatching,
        "dual batch overlap",
        "it may split a step inside a prompt, whose rows vote together",
    )


def _caches(vllm_config: VllmConfig) -> Iterator[_Feature]:
    # Imported here, so that this module loads, and can refuse, beside any version of vLLM.
    from himap_vllm.vllm_versions import is_quantized_kv_cache

    scheduler = vllm_config.scheduler_config
    cache_dtype = vllm_config.cache_config.cache_dtype
    scheme = getattr(vllm_config.quant_config, "kv_cache_scheme", None)
    if cache_dtype == "auto" and scheme is not None:
        cache_dtype = "fp8"  # what vLLM's attention layers make of it, once they are built
    yield _Feature(
        "kv_transfer_config",
        vllm_config.kv_transfer_config is not None,
        "KV connectors",
        "they assume that every layer has every token",
    )
    yield _Feature(
        "disable_hybrid_kv_cache_manager",
        bool(scheduler.disable_hybrid_kv_cache_manager),
        "--disable-hybrid-kv-cache-manager",
        "stages need KV cache groups of their own",
    )
    yield _Feature(
        "kv_cache_dtype",
        is_quantized_kv_cache(cache_dtype),
        f"a quantised KV cache (kv_cache_dtype {cache_dtype}, asked for or the checkpoint's)",
        "votes need queries and the keys of earlier chunks as the model computed them, not "
        "rounded to 8 bits",
    )
    yield _Feature(
        "ec_transfer_config",
        vllm_config.ec_transfer_config is not None,
        "an encoder cache connector",
        "it delivers images one by one, but a pruned prompt needs all of its images in the "
        "same step",
    )


def _steps(vllm_config: VllmConfig) -> Iterator[_Feature]:
    from vllm.config import CUDAGraphMode

    yield _Feature(
        "cudagraph_mode",
        vllm_config.compilation_config.cudagraph_mode == CUDAGraphMode.FULL,
        "cudagraph_mode FULL",
        "steps that prune can't replay a full graph",
    )
    yield _Feature(
        "VLLM_USE_BREAKABLE_CUDAGRAPH",
        envs.VLLM_USE_BREAKABLE_CUDAGRAPH,
        "breakable CUDA graphs",
        "a step that prunes would replay those of another (VLLM_USE_BREAKABLE_CUDAGRAPH=0 "
        "turns them off, also where vLLM itself chose them)",
    )
    yield _Feature(
        "VLLM_BATCH_INVARIANT",
        envs.VLLM_BATCH_INVARIANT,
        "batch invariance (VLLM_BATCH_INVARIANT)",
        "the last bits of a prompt's scores depend on the other prompts of its step",
    )
    speculative = vllm_config.speculative_config
    by_ngram = speculative is not None and speculative.method == "ngram"
    yield _Feature(
        "speculative_config",
        speculative is not None and not by_ngram,
        "speculative decoding but by ngram",
        "drafts need the hidden states of all tokens",
    )
    yield _Feature(
        "speculative_config",
        by_ngram and vllm_config.use_v2_model_runner,
        "speculative decoding on Model Runner V2",
        "the host does not know there how many drafts were accepted, and computes from that how "
        "much of a pruned prompt each stage holds",
    )


def _modes(vllm_config: VllmConfig) -> Iterator[_Feature]:
    yield _Feature(
        "enable_return_routed_experts",
        vllm_config.aux_output_config.enable_return_routed_experts,
        "--enable-return-routed-experts",
        "dropped image tokens have no experts in the layers behind a cut",
    )
    yield _Feature(
        "mm_encoder_only",
        vllm_config.is_mm_encoder_only,
        "an encoder-only instance",
        "it has no decoder to prune in",
    )
    yield _Feature(
        "VLLM_USE_RUST_FRONTEND",
        envs.VLLM_USE_RUST_FRONTEND,
        "the Rust frontend",
        "requests would not pass the plugin's admission",
    )
    yield _Feature(
        "is_mm_prefix_lm",
        vllm_config.model_config.is_mm_prefix_lm,
        "bidirectional attention among image tokens",
        "scores are computed from causal attention",
    )
    yield _Feature(
        "runner",
        vllm_config.model_config.runner_type != "generate",
        "pooling",
        "it may read the hidden state of every token",
    )
