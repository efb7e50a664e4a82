# SPDX-License-Identifier: Apache-2.0
"""Our Triton kernels against plain torch: fresh random inputs, poisoned outputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from himap_vllm.kernels.gather import gather_rows
from himap_vllm.kernels.importance import BLOCK_KEYS, BLOCK_ROWS, KeyPages, VoteTiles, importance
from himap_vllm.kernels.stage_slots import PAD_SLOT, write_stage_slots
from himap_vllm.kernels.upload import upload
from himap_vllm.plan.prompt import ImageTokens, PromptPlan, Ratios, make_plan
from himap_vllm.plan.step_layout import Cut, plan_step
from himap_vllm.pruning.importance import importance as reference
from tests import isolated

_SEEDS = itertools.count(torch.seed() % 2**31)


@pytest.fixture
def random() -> torch.Generator:
    """Seeded anew in every run; pytest shows the seed of a failure."""
    seed = next(_SEEDS)
    print("seed", seed)
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is NaN, or a huge integer."""

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**30)

    empty, new_empty = torch.empty, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


def plan_with(num_tokens: int, *images: tuple[int, int]) -> PromptPlan:
    plan = make_plan(num_tokens, [ImageTokens((image,)) for image in images], Ratios(0.5, 0.5))
    assert plan is not None
    return plan


# Rows that vote: fewer than a block, several blocks, one; images: one to three, one of two tiles
# and more than a block of keys; a chunk of text before; unpruned requests before and between; two
# units in a chunk that begins behind another.
CONVERSATION = make_plan(
    230,
    [ImageTokens((image,)) for image in ((5, 30), (50, 90), (100, 140), (150, 221))],
    Ratios(0.5, 0.5),
    [40, 145, 145, 225],
)
PLANS = (
    None,
    plan_with(60, (5, 41)),
    plan_with(200, (10, 90), (95, 110), (110, 160)),
    None,
    plan_with(45, (9, 45)),
    plan_with(130, (70, 106)),
    CONVERSATION,
)
COMPUTED = (7, 0, 3, 0, 9, 66, 41)
SCHEDULED = (1, 60, 197, 12, 36, 64, 187)
NO_KEYS = KeyPages(torch.zeros(1, 2, 16, 16), torch.zeros(1, 1, dtype=torch.int32))


def cached_in(stage: int) -> list[int]:
    """Keys that each request has in the cache."""
    return [
        num_computed if plan is None else plan.stage_tokens(stage, num_computed)
        for plan, num_computed in zip(PLANS, COMPUTED, strict=True)
    ]


def cut_of(index: int) -> Cut:
    cuts = plan_step(COMPUTED, SCHEDULED, PLANS).cuts
    assert cuts is not None
    return cuts[index]


def second_image_tokens(random: torch.Generator) -> torch.Tensor:
    """Rows of the survivors of a first cut, chosen at random."""
    first, cut = cut_of(0), cut_of(1)
    assert first.image_tokens is not None
    rows = []
    alive = torch.ones(sum(SCHEDULED), dtype=torch.bool)
    for before, unit in zip(first.units, cut.units, strict=True):
        old = torch.from_numpy(first.image_tokens[before.image_tokens])
        for vote, now in zip(before.votes, unit.votes, strict=True):
            order = old[vote.tokens][torch.randperm(len(old[vote.tokens]), generator=random)]
            alive[order[now.tokens.stop - now.tokens.start :]] = False
        is_image = torch.zeros_like(alive)
        is_image[old] = True
        left = is_image[before.tokens][alive[before.tokens]]
        assert len(left) == unit.tokens.stop - unit.tokens.start
        rows.append(left.nonzero()[:, 0] + unit.tokens.start)
    return torch.cat(rows)


class Allocations(TorchDispatchMode):
    """Adds up the bytes of the tensors that are allocated, and of sums."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "empty" in str(func) or "zeros" in str(func) or "sum" in str(func):
            self.num_bytes += result.nbytes
        return result


@pytest.mark.parametrize("num_tokens", [256, 1024])
def test_scores_take_memory_in_proportion_to_the_step(num_tokens: int) -> None:
    """One image: all its tokens vote at the second cut."""
    num_heads = 2
    plan = make_plan(num_tokens + 2, [ImageTokens(((1, num_tokens + 1),))], Ratios(0, 0.5))
    cuts = plan_step([0], [num_tokens + 2], [plan]).cuts
    assert cuts is not None
    query = torch.zeros(num_tokens + 2, num_heads, 16)
    tiles = VoteTiles.of(cuts[1])
    of_rows, of_columns = torch.from_numpy(tiles.of_rows), torch.from_numpy(tiles.of_columns)
    image_tokens = torch.arange(1, num_tokens + 1)
    with Allocations() as allocations:
        importance(query, query, NO_KEYS, 1.0, of_rows, of_columns, image_tokens, image_tokens)
    assert 0 < allocations.num_bytes <= 4 * num_tokens * (2 * num_heads + 1)


def paged(
    random: torch.Generator,
    values: Callable[..., torch.Tensor],
    num_kv_heads: int,
    head_size: int,
    stage: int,
    block_size: int = 16,
) -> KeyPages:
    """Keys of `cached_in`, beside their values; NaN wherever no prompt has a key."""
    lengths = cached_in(stage)
    width = -(-max(lengths) // block_size)
    num_pages = len(lengths) * width + 1
    cache = values(num_pages, num_kv_heads, block_size, 2 * head_size)
    order = torch.randperm(num_pages, generator=random).int()
    cache[order[-1]] = float("nan")
    block_table = order[:-1].view(len(lengths), width).clone()
    for table, num_cached in zip(block_table, lengths, strict=True):
        full, rest = divmod(num_cached, block_size)
        cache[table[full], :, rest:] = float("nan")
        table[full + (rest > 0) :] = order[-1]
    return KeyPages(cache[..., :head_size], block_table)


@pytest.mark.parametrize("index", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_size", "dtype"),
    # No bfloat16: the interpreter multiplies its bit patterns as integers.
    [(2, 2, 32, torch.float32), (4, 2, 80, torch.float32), (2, 1, 64, torch.float16)],
)
def test_importance(
    random: torch.Generator,
    index: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
) -> None:
    cut = cut_of(index)
    step = plan_step(COMPUTED, SCHEDULED, PLANS)
    num_tokens = step.stages[index].num_tokens
    padding = 5  # rows of a captured size

    def values(*shape: int) -> torch.Tensor:
        return 2 * torch.randn(shape, generator=random).to(dtype)

    # One projection's output, as vLLM's layers split it: rows are not contiguous.
    qkv = values(num_tokens + padding, (num_heads + 2 * num_kv_heads) * head_size)
    qkv[num_tokens:] = float("nan")
    query, key, _ = qkv.split(
        [num_heads * head_size, num_kv_heads * head_size, num_kv_heads * head_size], dim=1
    )
    query = query.view(-1, num_heads, head_size)
    key = key.view(-1, num_kv_heads, head_size)
    cached = paged(random, values, num_kv_heads, head_size, index)
    if cut.image_tokens is None:
        image_tokens = second_image_tokens(random)
    else:
        image_tokens = torch.from_numpy(cut.image_tokens)
    tiles = VoteTiles.of(cut)
    # Full and partly full tiles, of both kinds; images of several; several blocks of voters.
    assert {int(n) for n in tiles.of_rows[:, 1]} > {BLOCK_ROWS}
    assert {int(n) for n in tiles.of_columns[:, 3]} - {BLOCK_KEYS}
    assert tiles.of_columns[:, 1].max() > BLOCK_ROWS
    scores = importance(
        query,
        key,
        cached,
        head_size**-0.5,
        torch.from_numpy(tiles.of_rows),
        torch.from_numpy(tiles.of_columns),
        image_tokens if tiles.rows is None else torch.from_numpy(tiles.rows),
        image_tokens,
    )
    expected = reference(
        query,
        key,
        lambda rows, _: KeyPages(cached.pages, cached.block_table[rows]),
        head_size**-0.5,
        cut,
        image_tokens,
    )
    assert scores.dtype == expected.dtype == torch.float32
    assert scores.shape == (cut.num_image_tokens,)
    torch.testing.assert_close(scores, expected, rtol=2e-5, atol=1e-5)


def test_upload() -> None:
    shapes = [(3,), (0,), (5, 3), (1,), (4, 2)]
    arrays = [np.random.default_rng().integers(0, 2**40, shape) for shape in shapes]
    tensors = upload(arrays, torch.device("cpu"))
    start = tensors[0].data_ptr()
    for tensor, array in zip(tensors, arrays, strict=True):
        assert tensor.shape == array.shape
        assert tensor.tolist() == array.tolist()
        assert (tensor.data_ptr() - start) % 16 == 0


@pytest.mark.parametrize("width", [96, 1500])
def test_gather(random: torch.Generator, width: int) -> None:
    positions = torch.randint(10_000, (40,), generator=random)
    hidden, both = (torch.randn(40, n * width, generator=random) for n in (1, 2))
    residual = both[:, width:]  # not contiguous
    rows = torch.randperm(40, generator=random)[:17].sort().values
    gathered = gather_rows(rows, positions, hidden, residual)
    for result, source in zip(gathered, (positions, hidden, residual), strict=True):
        assert result.is_contiguous()
        assert torch.equal(result, source[rows])
    for_mrope = torch.randint(10_000, (3, 51), generator=random)[:, :40]
    result, *_ = gather_rows(rows, for_mrope, hidden, residual)
    assert result.stride() == for_mrope.stride()
    assert torch.equal(result, for_mrope[:, rows])
    # Into the inputs of captured graphs, whose other rows are padding.
    out = torch.full((51,), -1)[:24], torch.full((24, width), -1.0), torch.full((24, width), -1.0)
    assert gather_rows(rows, positions, hidden, residual, out) is out
    for result, source in zip(out, (positions, hidden, residual), strict=True):
        assert torch.equal(result[:17], source[rows])
        assert (result[17:] == -1).all()


def test_stage_slots(random: torch.Generator) -> None:
    step = plan_step(COMPUTED, SCHEDULED, PLANS)
    stages = [0, 2, 1, 1, 2]
    block_sizes = [16, 16, 16, 32, 8]
    num_reqs, padded = len(PLANS), sum(SCHEDULED) + 9
    tables = [
        torch.randint(1, 10_000, (8, 40), generator=random, dtype=torch.int32) for _ in stages
    ]
    slots = torch.full((len(stages), padded), 77)
    later = [(group, stage - 1) for group, stage in enumerate(stages) if stage]

    def side_by_side(name: str) -> torch.Tensor:
        rows = [torch.from_numpy(getattr(stage, name)) for stage in step.stages[1:]]
        return torch.nn.functional.pad(torch.stack(rows), (0, 3), value=2**30)

    write_stage_slots(
        torch.tensor(later),
        side_by_side("query_start_loc"),
        side_by_side("seq_lens"),
        num_reqs,
        torch.tensor([table.data_ptr() for table in tables], dtype=torch.uint64),
        torch.tensor([table.stride(0) for table in tables]),
        torch.tensor(block_sizes, dtype=torch.int32),
        slots,
    )
    assert slots[0].tolist() == [77] * padded
    for group, stage in enumerate(stages):
        if not stage:
            continue
        batch = step.stages[stage]
        request = np.repeat(np.arange(num_reqs), np.diff(batch.query_start_loc))
        block, offset = np.divmod(batch.positions, block_sizes[group])
        expected: Any = tables[group].numpy()[request, block] * block_sizes[group] + offset
        assert slots[group].tolist() == [
            *expected.tolist(),
            *[PAD_SLOT] * (padded - batch.num_tokens),
        ]


def scoring_times() -> list[float]:
    """Of steps of one and of two prompts."""
    from bench.gpu.plan import tiny
    from bench.gpu.probe import Probe

    plan, probe = tiny("cpu", 60), Probe("cpu")
    cuts = plan.systems[-1].cuts(plan)
    found = [probe.scoring(plan.shape, cuts, 35, prompts, times=1) for prompts in (1, 2)]
    probe.close()
    return [times["device_ms"] for times in found]


def test_the_benchmark_of_scoring_runs() -> None:
    """What it hands to the kernels is made there, and nothing else on a CPU runs it with Triton.

    In a process of its own, as it makes and ends the group of ranks.
    """
    assert min(isolated.call(scoring_times)) > 0
