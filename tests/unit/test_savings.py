# SPDX-License-Identifier: Apache-2.0
"""The numbers in `usage.himap`, against ones worked out by hand."""

import pytest

from himap_vllm.plan.prompt import ImageTokens, Ratios, make_plan
from himap_vllm.plan.savings import DecoderShape, ImageSavings, prompt_savings

LLAMA_7B = DecoderShape(
    hidden_size=4096, intermediate_size=11008, num_heads=32, num_kv_heads=32, head_size=128
)


def test_llava_7b_with_a_short_question() -> None:
    plan = make_plan(611, [ImageTokens(((5, 581),))], Ratios(0.5, 0.75))
    savings = prompt_savings(611, [576], plan, (2, 6, 24), LLAMA_7B)
    assert savings.image_tokens == 576
    assert savings.kept_shallow == 288
    assert savings.kept_deep == 72
    assert savings.kv_tokens == 2 * 611 + 6 * 323 + 24 * 107
    assert savings.kv_tokens_unpruned == 32 * 611
    # 7 B parameters: 12.9 GFLOPs per token in the layers' matrices, attention on top.
    assert LLAMA_7B.layer_flops(1) * 32 == pytest.approx(12.95e9, rel=1e-3)
    assert savings.as_usage()["prefill_flops_ratio"] == pytest.approx(0.291, abs=2e-3)


def test_several_prompts_add_up() -> None:
    plan = make_plan(611, [ImageTokens(((5, 581),))], Ratios(0.5, 0.75))
    pruned = prompt_savings(611, [576], plan, (2, 6, 24), LLAMA_7B)
    whole = prompt_savings(611, [576], None, (2, 6, 24), LLAMA_7B)
    usage = (pruned + whole).as_usage()
    assert usage["kept_deep"] == 576 + 72
    assert usage["prefill_flops_ratio"] == pytest.approx(
        (pruned.as_usage()["prefill_flops_ratio"] + 1) / 2
    )


def test_unpruned() -> None:
    savings = prompt_savings(611, [576], None, (2, 6, 24), LLAMA_7B)
    assert savings.kept_deep == 576
    assert savings.kv_tokens == savings.kv_tokens_unpruned
    assert savings.as_usage()["prefill_flops_ratio"] == 1.0


def test_grouped_query_attention_has_smaller_key_and_value_matrices() -> None:
    shape = DecoderShape(64, 128, num_heads=4, num_kv_heads=1, head_size=16)
    projections = 64 * 64 * 2 + 64 * 16 * 2
    assert shape.layer_flops(1) == 2 * (projections + 3 * 64 * 128) + 4 * 64


def test_each_image_and_the_sum() -> None:
    """Ratios of their own; a second prompt adds its images."""
    images = [ImageTokens(((5, 105),)), ImageTokens(((110, 150),))]
    plan = make_plan(200, images, [Ratios(0, 0), Ratios(0.5, 0.75)])
    savings = prompt_savings(200, [100, 40], plan, (2, 6, 24), LLAMA_7B)
    whole, cut, other = ImageSavings(100, 100, 100), ImageSavings(40, 20, 5), ImageSavings(7, 7, 7)
    assert savings.images == (whole, cut)
    assert (savings.image_tokens, savings.kept_shallow, savings.kept_deep) == (140, 120, 105)
    total = savings + prompt_savings(20, [7], None, (2, 6, 24), LLAMA_7B)
    assert total.images == (whole, cut, other)
    assert total.kept_deep == 112
    assert "images" not in total.as_usage()
