# SPDX-License-Identifier: Apache-2.0
"""Which KV cache groups an engine asks for, and what it takes from vLLM."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import envs
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from himap_vllm.config import EngineSettings
from himap_vllm.core.stage_groups import StageGroups
from himap_vllm.core.stage_kv_cache_manager import StageAttentionSpec
from himap_vllm.plan.cuts import KVGrouping
from himap_vllm.pruning.kv_groups import KVGroups, packed_layouts

SHAPE: dict[str, Any] = {"num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
PAGE = 96 * 2 * 32 * 4  # bytes


class FixedBlocks(CPUAttentionBackend):
    """Takes blocks of 64 tokens only."""

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: Any = None,  # noqa: ARG004
    ) -> list[int | MultipleOf]:
        return [64]


class HeadsOutside(CPUAttentionBackend):
    """Heads lie around blocks."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LHBNC,)


def chosen(
    kv_grouping: KVGrouping,
    backend: type[AttentionBackend] = CPUAttentionBackend,
    block_size: int = 128,
    asked_for: bool = False,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    groups = KVGroups(EngineSettings(kv_grouping=kv_grouping), 32)
    cache_config = SimpleNamespace(user_specified_block_size=asked_for)
    found = groups.choose(backend, FullAttentionSpec(block_size=block_size, **SHAPE), cache_config)
    return found.block_sizes, found.parts


def test_block_sizes_on_a_cpu() -> None:
    assert chosen("balanced") == ((96, 32, 32), (1, 1, 4))
    assert chosen("few") == ((384, 128, 32), (1, 1, 1))
    assert chosen("many") == ((128,) * 3, (1, 3, 12))
    assert chosen("balanced", block_size=64, asked_for=True) == ((192, 64, 64), (1, 1, 4))


def warnings_of(kv_grouping: KVGrouping, cuts: tuple[int, int], layers: int) -> list[str]:
    settings = EngineSettings(kv_grouping=kv_grouping, shallow_layer=cuts[0], deep_layer=cuts[1])
    groups = KVGroups(settings, layers)
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vllm.himap").addHandler(handler)
    try:
        spec = FullAttentionSpec(block_size=128, **SHAPE)
        groups.choose(CPUAttentionBackend, spec, SimpleNamespace(user_specified_block_size=False))
    finally:
        logging.getLogger("vllm.himap").removeHandler(handler)
    return records


def test_a_choice_that_cannot_be_is_told() -> None:
    assert warnings_of("few", (2, 8), 32) == []
    assert warnings_of("balanced", (2, 8), 32) == []
    (warning,) = warnings_of("few", (2, 8), 28)
    assert 'kv_grouping is "balanced" instead of "few"' in warning
    assert "2, 6, 20 layers" in warning


@pytest.mark.parametrize(
    ("backend", "block_size", "layout"),
    [
        (FixedBlocks, 128, None),
        (HeadsOutside, 128, None),
        (CPUAttentionBackend, 48, None),
        (CPUAttentionBackend, 128, "LBHNC"),
    ],
)
@pytest.mark.parametrize("kv_grouping", ["few", "balanced"])
def test_blocks_of_one_size_where_others_cannot_be(
    backend: type[AttentionBackend],
    block_size: int,
    layout: str | None,
    kv_grouping: KVGrouping,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(vars(envs), "VLLM_KV_CACHE_LAYOUT", layout)
    assert chosen(kv_grouping, backend, block_size) == ((block_size,) * 3, (1, 3, 12))


def test_layouts_keep_what_kernels_see_of_a_block() -> None:
    assert packed_layouts(CPUAttentionBackend) == (KVCacheLayout.BLHNC,)
    assert packed_layouts(HeadsOutside) == ()
    assert set(packed_layouts(AttentionBackend)) == {KVCacheLayout.BLNHC, KVCacheLayout.BLHNC}


def made(block_stride: int = PAGE, sizes: tuple[int, ...] = (48, 16, 16)) -> KVCacheConfig:
    """What vLLM makes of 2, 6 and 12 layers."""
    groups: list[KVCacheGroupSpec] = []
    for stage, layers in ((0, 2), (1, 6), (2, 6), (2, 6)):
        spec = StageAttentionSpec(block_size=sizes[stage], stage=stage, **SHAPE)
        groups.append(KVCacheGroupSpec([f"{len(groups)}.{i}" for i in range(layers)], spec))
    tensors = [
        KVCacheTensor(10 * PAGE, group.layer_names, PAGE // len(group.layer_names), block_stride)
        for group in groups
    ]
    return KVCacheConfig(num_blocks=10, kv_cache_tensors=tensors, kv_cache_groups=groups)


def test_groups_are_checked() -> None:
    groups = StageGroups.of(made(), (2, 6, 12))
    assert groups.stages == [0, 1, 2, 2]
    assert groups.leaders == [0, 1, 2]
    assert (groups.block_sizes, groups.bytes_per_block) == ([48, 16, 16], PAGE)
    assert groups.num_blocks(100) == [3, 7, 7, 7]
    with pytest.raises(RuntimeError, match=r"expected \[2, 8, 10\] layers per stage"):
        StageGroups.of(made(), (2, 8, 10))
    with pytest.raises(RuntimeError, match="one behind another"):
        StageGroups.of(made(block_stride=16), (2, 6, 12))
    mixed = made()
    mixed.kv_cache_groups[3].kv_cache_spec = StageAttentionSpec(block_size=48, stage=2, **SHAPE)
    with pytest.raises(RuntimeError, match="blocks of one size in each stage"):
        StageGroups.of(mixed, (2, 6, 12))
