# SPDX-License-Identifier: Apache-2.0
"""What a pruning step costs on the host: launches, waits for the device, work per prompt."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.checkpoints import sample_images
from tests.engines import WARM, Case, Engine
from tests.world import World, assert_equals_oracle

PICTURES = tuple(sample_images(8, seed=5))

BY_MASK = "index by a mask"
# Operations whose result, or its size, the host must read from the device.
WAITING = {
    BY_MASK,  # finds out where it is true
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.item.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.unique_consecutive.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.repeat_interleave.Tensor,
    torch.ops.aten._to_copy.default,  # from one device to another, or of one dtype to another
}


class Operations(TorchDispatchMode):
    """Records the operations that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indexes = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
        by_mask = indexes and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.seen.append(BY_MASK if by_mask else func)
        return func(*args, **(kwargs or {}))


class Launches:
    """Stands before a Triton kernel and counts."""

    def __init__(self, kernel: Any, name: str, counts: Counter[str]) -> None:
        self._kernel, self._name, self._counts = kernel, name, counts

    def __getitem__(self, grid: Any) -> Any:
        self._counts[self._name] += 1
        return self._kernel[grid]


def pruning_step(engine: Engine, monkeypatch: pytest.MonkeyPatch, cases: list[Case]) -> Any:
    """Operations within score and cut, and kernel launches, of the one step that prunes."""
    from himap_vllm.kernels import gather, importance, stage_slots
    from himap_vllm.pruning.cut import PruningCut

    launches: Counter[str] = Counter()
    with monkeypatch.context() as patch:
        for module, name in (
            (importance, "_log_totals_kernel"),
            (importance, "_vote_kernel"),
            (gather, "_gather_kernel"),
            (stage_slots, "_stage_slots_kernel"),
        ):
            patch.setattr(module, name, Launches(getattr(module, name), name, launches))
        seen: list[Any] = []
        for name in ("score", "choose", "image_tokens_left"):
            method = getattr(PruningCut, name)

            def recorded(*args: Any, _method: Any = method) -> Any:
                with Operations() as operations:
                    result = _method(*args)
                seen.extend(operations.seen)
                return result

            patch.setattr(PruningCut, name, recorded)
        before = engine.stats["steps"]
        outputs = engine.generate([*cases])
        assert engine.stats["steps"] == before + 1
    return seen, launches, outputs


def test_launches_by_stage_and_no_wait(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = world.engine()
    first = Case("USER: <image>\nWhat? ASSISTANT:", PICTURES[:1], (0.5, 0.75), max_tokens=1)
    more = [
        Case("USER: <image> or <image>? ASSISTANT:", PICTURES[1:3], (0.25, 0.9), max_tokens=1),
        Case("Words before: <image>", PICTURES[3:4], (0.75, 0.5), max_tokens=1),
        Case("Unpruned <image>", PICTURES[3:4], (0, 0), max_tokens=1),
    ]
    alone, launches_alone, _ = pruning_step(engine, monkeypatch, [first])
    together, launches, outputs = pruning_step(engine, monkeypatch, [first, *more])
    for case, output in zip([first, *more], outputs, strict=True):
        assert_equals_oracle(world, engine, "mha12", case, output)
    expected = {
        "_log_totals_kernel": 2,
        "_vote_kernel": 2,
        "_gather_kernel": 2,
        "_stage_slots_kernel": 1,
    }
    assert launches == launches_alone == expected
    assert not WAITING & set(together)
    assert torch.ops.aten.sort.stable in together
    # Not one operation more for three pruned prompts than for one.
    assert Counter(map(str, together)) == Counter(map(str, alone))


def waits_by_step(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, cases: list[Case]
) -> tuple[list[Counter[Any]], list[str]]:
    """Waits in all of each step, and reads of tensors that torch dispatches only on a GPU."""
    core = engine.llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    waits: list[Counter[Any]] = []
    reads: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("execute_model", "sample_tokens"):
            method = getattr(runner, name)

            def recorded(*args: Any, _method: Any = method, **kwargs: Any) -> Any:
                with Operations() as operations:
                    result = _method(*args, **kwargs)
                waits.append(Counter(func for func in operations.seen if func in WAITING))
                return result

            patch.setattr(runner, name, recorded)
        for name in ("tolist", "numpy", "cpu", "__array__"):
            method = getattr(torch.Tensor, name)

            def read(*args: Any, _method: Any = method, **kwargs: Any) -> Any:
                caller = sys._getframe(1)
                if caller.f_globals["__name__"].startswith("himap_vllm"):
                    reads.append(f"{caller.f_code.co_filename}:{caller.f_lineno}")
                return _method(*args, **kwargs)

            patch.setattr(torch.Tensor, name, read)
        engine.llm.reset_prefix_cache()
        engine.generate(cases)
    return waits, reads


def test_steps_wait_nowhere_but_where_stock_does(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefills and decoding, from the scheduler's output to the sampled tokens."""
    cases = [
        Case("USER: <image>\nWhat? ASSISTANT:", PICTURES[:1], (0.5, 0.75), max_tokens=4),
        Case("USER: <image> or <image>? ASSISTANT:", PICTURES[1:3], (0.25, 0.9), max_tokens=1),
        Case("Unpruned <image>", PICTURES[3:4], (0, 0), max_tokens=3),
    ]
    engine = world.engine(himap={"trace_requests": 0})
    unpruned = [replace(case, ratios=None) for case in cases]
    stock, _ = waits_by_step(world.stock(), monkeypatch, unpruned)
    # A request that asks for its trace gets it without a wait.
    args = {"himap_shallow_ratio": 0.25, "himap_deep_ratio": 0.9, "himap_trace": "name"}
    cases[1] = replace(cases[1], ratios=None, params={"extra_args": args})
    pruned, reads = waits_by_step(engine, monkeypatch, cases)
    (found,) = engine.llm.collective_rpc("himap_take_trace", args=("name",))
    assert [len(kept) for kept in found["kept"][0]] == [27, 27]
    assert engine.stats["steps"] > 0
    assert len(stock) == 8  # one prefill and three steps of decoding
    assert stock[0][BY_MASK] == 1  # vLLM puts the images' embeddings in their places
    assert pruned == stock
    assert not reads
    # Traces are read back, and say so: the reads would have been seen.
    traced, reads = waits_by_step(world.engine(), monkeypatch, cases)
    assert traced == stock
    assert len(reads) == 8  # kept tokens and attention, at both cuts of two prompts


@pytest.mark.parametrize(
    ("criterion", "voting_cuts"),
    [
        ("uniform+half", 1),
        ("random", 0),
        ("uniform", 0),
        ("mixed", 2),
        ("stratified", 2),
        ("debiased", 2),
    ],
)
def test_no_criterion_waits(
    world: World, monkeypatch: pytest.MonkeyPatch, criterion: str, voting_cuts: int
) -> None:
    engine = world.engine(himap={"criterion": criterion})
    case = Case("USER: <image>\nWhat? ASSISTANT:", PICTURES[:1], (0.5, 0.75), max_tokens=1)
    seen, launches, _ = pruning_step(engine, monkeypatch, [case])
    assert not WAITING & set(seen)
    assert launches["_vote_kernel"] == voting_cuts


def test_operations_do_not_depend_on_cached_prompts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys of text that precedes the images come from the cache in one read per cut."""
    engine = world.engine()
    text = "Words enough for several blocks of the KV cache, before a picture. " * 2
    cases = [
        Case(f"{text}<image> {question}", (picture,), (0.5, 0.5), max_tokens=1, params=WARM)
        for question, picture in zip(("Who?", "Where is it?", "Why?"), PICTURES[:3], strict=True)
    ]
    engine.generate([Case(text, (), None, max_tokens=1)])  # into the prefix cache
    # Other ratios, or the prefix cache would have its images.
    engine.generate([replace(cases[0], ratios=(0.25, 0.5))])  # learns how this CPU orders keys
    alone, *_ = pruning_step(engine, monkeypatch, [replace(cases[0], ratios=(0.75, 0.5))])
    together, _, outputs = pruning_step(engine, monkeypatch, cases)
    for case, output in zip(cases, outputs, strict=True):
        assert output.num_cached_tokens > 0
        assert_equals_oracle(world, engine, "mha12", case, output)
    assert Counter(map(str, together)) == Counter(map(str, alone))


def test_warm_up_leaves_no_trace(world: World) -> None:
    engine = world.engine()
    core = engine.llm.llm_engine.engine_core.engine_core
    before = engine.stats
    core.model_executor.driver_worker.worker.model_runner.model_state.warm_up()
    assert engine.stats == before
    case = Case("USER: <image>\nAnd now? ASSISTANT:", PICTURES[:1], (0.5, 0.75))
    (output,) = engine.generate([case])
    assert_equals_oracle(world, engine, "mha12", case, output)
