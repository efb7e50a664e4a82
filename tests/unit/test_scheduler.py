# SPDX-License-Identifier: Apache-2.0
"""The pruning scheduler, step by step, without a worker: who gets how many tokens, and when."""

from __future__ import annotations

import inspect
import textwrap
import zlib
from collections.abc import Sequence
from operator import mul
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched import scheduler as vllm_scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from himap_vllm.core.scheduler import PruningScheduler
from himap_vllm.core.stage_kv_cache_manager import StageAttentionSpec
from himap_vllm.plan.prompt import PromptPlan, Ratios
from himap_vllm.plan.requests import Decision, stamp
from himap_vllm.plan.waiting import PATIENCE, PassedOver
from tests.checkpoints import build_llava

SIZE = 16
LIMIT = 256
NUM_GROUPS = 6  # of two layers: 2 / 6 / 4 layers per stage


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    init_none_hash(sha256)
    path = tmp_path_factory.mktemp("checkpoints") / "llava"
    build_llava(path, image_size=84, patch_size=14, num_layers=12, num_heads=4, num_kv_heads=4)
    return path


class Steps:
    """A scheduler and a worker that answers every request with the same token."""

    def __init__(self, checkpoint: Path, num_blocks: int = 4000) -> None:
        config = EngineArgs(
            model=str(checkpoint),
            additional_config={"himap": {"shallow_layer": 2, "deep_layer": 8}},
            max_model_len=1024,
            max_num_seqs=64,
            max_num_batched_tokens=LIMIT,
            dtype="float32",
        ).create_engine_config()
        config.cache_config.num_gpu_blocks = num_blocks
        shape: dict[str, Any] = {"num_kv_heads": 4, "head_size": 16, "dtype": torch.float32}
        groups = []
        for stage, names in enumerate((range(2), range(2, 8), range(8, 12))):
            spec = StageAttentionSpec(block_size=SIZE, stage=stage, **shape)
            layers = [f"model.layers.{i}.attn" for i in names]
            groups += [KVCacheGroupSpec(layers[i : i + 2], spec) for i in range(0, len(layers), 2)]
        assert len(groups) == NUM_GROUPS
        self.scheduler: Any = PruningScheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=SIZE,
            hash_block_size=SIZE,
        )

    def add(
        self,
        name: str,
        num_tokens: int,
        image: int | Sequence[int] | None = None,
        answer: int = 200,
        ends: tuple[int, ...] = (),
        sizes: Sequence[int] = (),
        ratios: Sequence[Ratios] = (),
    ) -> None:
        """A request; with images of 36 tokens at `image`, a pruned one whose units have `ends`."""
        params = SamplingParams(max_tokens=answer, ignore_eos=True)
        params.update_from_generation_config({}, 0)
        features = []
        if image is not None:
            places = [image] if isinstance(image, int) else image
            pruned = tuple(ratios) or (Ratios(0.5, 0.75),) * len(places)
            stamp(params, Decision("pruned", pruned, ends))
            features = [
                MultiModalFeatureSpec(None, "image", f"{name} {i}", PlaceholderRange(i, size))
                for i, size in zip(places, sizes or [36] * len(places), strict=True)
            ]
        hasher = get_request_block_hasher(SIZE, sha256)
        tokens = [zlib.crc32(name.encode())] * num_tokens
        self.scheduler.add_request(
            Request(name, tokens, params, None, mm_features=features, block_hasher=hasher)
        )

    def step(self) -> dict[str, int]:
        """Tokens of each request in the next step."""
        output = self.scheduler.schedule()
        names = list(output.num_scheduled_tokens)
        sampled = [
            [7] if request.num_computed_tokens >= request.num_prompt_tokens else []
            for request in map(self.scheduler.requests.__getitem__, names)
        ]
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: i for i, name in enumerate(names)},
                sampled_token_ids=sampled,
            ),
        )
        scheduled: dict[str, int] = output.num_scheduled_tokens
        return scheduled

    def chunks(self, name: str, num_steps: int) -> list[int]:
        """Tokens of one request in each of the next steps."""
        return [self.step().get(name, 0) for _ in range(num_steps)]


@pytest.fixture
def busy(checkpoint: Path) -> Steps:
    """20 requests decode."""
    steps = Steps(checkpoint)
    for i in range(20):
        steps.add(f"decoding {i}", 4)
    for _ in range(3):
        steps.step()
    return steps


def test_text_runs_ahead_while_others_decode(busy: Steps) -> None:
    busy.add("pruned", 246, image=200)
    busy.add("behind", 30)
    assert busy.chunks("pruned", 3) == [200, 46, 1]
    assert "behind" in busy.step()


def test_room_of_a_later_step_is_what_drafts_leave(
    busy: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    later: list[int] = []
    chunk = PromptPlan.chunk

    def recorded(plan: PromptPlan, *args: int) -> int:
        later.append(args[-1])
        return chunk(plan, *args)

    monkeypatch.setattr(PromptPlan, "chunk", recorded)
    busy.scheduler.num_spec_tokens = 3
    busy.add("pruned", 250, image=200)
    busy.step()
    assert later[0] == LIMIT - 20 * (1 + 3)


def test_a_conversation_is_computed_unit_by_unit(busy: Steps) -> None:
    """Several units in a step, the text behind them in chunks; others decode, and wait for none."""
    busy.add("pruned", 900, [100, 160, 230, 700], ends=(150, 300, 300, 760))
    busy.add("behind", 30)
    chunks = busy.chunks("pruned", 6)
    # 236 tokens of each step are free. The second unit begins at 160, the last one at 700.
    assert chunks == [160, 236, 236, 68 + 60 + 108, 32, 1]
    assert "behind" in busy.step()


def test_an_image_that_is_not_pruned_is_finished_before_a_unit(busy: Steps) -> None:
    """Both together do not fit in the encoder cache, and a chunk has ended inside the first."""
    busy.add("ahead", 100)
    sizes, ratios = (180, 100), (Ratios(0, 0), Ratios(0.5, 0.75))
    busy.add("pruned", 310, [10, 200], ends=(195, 310), sizes=sizes, ratios=ratios)
    assert busy.chunks("pruned", 3) == [136, 64, 110]


def test_units_of_waiting_prompts_find_room(checkpoint: Path) -> None:
    """Conversations of which each unit needs most of a step, beside prompts that come and go."""
    steps = Steps(checkpoint)
    for i in range(6):
        steps.add(f"pruned {i}", 700, [50, 300, 520], 5, ends=(250, 510, 690))
    seen: dict[str, int] = {}
    for step in range(200):
        if step % 3 == 0:
            steps.add(f"other {step}", 150, answer=20)
        for name, num_tokens in steps.step().items():
            seen[name] = seen.get(name, 0) + num_tokens
        if all(seen.get(f"pruned {i}", 0) >= 700 for i in range(6)):
            break
    assert step < 100


def test_text_that_fits_no_step_is_chunked(busy: Steps) -> None:
    busy.add("pruned", 280, image=238)
    assert busy.chunks("pruned", 3) == [236, 44, 1]


def test_a_prompt_that_fits_the_next_step_waits_for_it(busy: Steps) -> None:
    """Another prompt has most of this step."""
    busy.add("first", 200, image=150)
    busy.add("second", 100, image=20)
    steps = [busy.step() for _ in range(2)]
    assert [step.get("first") for step in steps] == [200, 1]
    assert [step.get("second") for step in steps] == [None, 100]


@pytest.fixture
def skipping(monkeypatch: pytest.MonkeyPatch) -> None:
    """A waiting request without tokens is skipped, as in vLLM 0.33. In 0.32 it ends admission."""
    ends = "# The request cannot be scheduled.\n            break\n"
    skips = "skip_request(request_queue)\n            continue\n"
    source = textwrap.dedent(inspect.getsource(vllm_scheduler.Scheduler.schedule))
    ends, skips = (text.replace("\n    ", "\n" + " " * 12) for text in (ends, skips))
    if "Requeue it so it does" in source:  # this is 0.33 or later
        return
    assert source.count(ends) == 1
    scope: dict[str, Any] = {}
    exec(source.replace(ends, skips), vars(vllm_scheduler), scope)
    monkeypatch.setattr(vllm_scheduler.Scheduler, "schedule", scope["schedule"])


@pytest.mark.usefixtures("skipping")
def test_a_prompt_that_others_pass_gets_its_turn(checkpoint: Path) -> None:
    """Prompts of three steps, of which one more comes in each step."""
    steps = Steps(checkpoint)
    steps.add("long 0", 700, answer=1)
    steps.step()
    steps.add("pruned", 246, image=20)
    passed = set()
    for i in range(1, 10 * PATIENCE):
        steps.add(f"long {i}", 700, answer=1)
        scheduled = steps.step()
        if "pruned" in scheduled:
            break
        passed |= scheduled.keys() - {"long 0"}
    assert scheduled["pruned"] == 246
    assert len(passed) == PATIENCE
    assert not steps.scheduler.himap_passed.closed


def test_patience_is_for_each_prompt() -> None:
    passed = PassedOver()
    for step in range(PATIENCE + 1):
        passed.begin_step()
        passed.note("ran in between", 0)
        if step == 1:
            passed.note("ran in between", 5)
        assert not passed.closed
        passed.note("waits", 0)
        assert passed.closed == (step == PATIENCE)
    passed.forget("waits")
    passed.begin_step()
    passed.note("waits", 0)
    assert not passed.closed


def test_blocks_are_all_returned(checkpoint: Path) -> None:
    steps = Steps(checkpoint)
    pool = steps.scheduler.kv_cache_manager.block_pool
    before = pool.get_num_free_blocks()
    steps.add("pruned", 120, image=40, answer=40)
    steps.add("unpruned", 120, answer=30)
    while steps.step():
        pass
    assert pool.get_num_free_blocks() == before
    assert not steps.scheduler.himap_plans
    # Both are cached, the pruned one with tails: 159 tokens, of which 18 and 31 image tokens go.
    cached = sum(block.block_hash is not None for block in pool.blocks)
    of_stages = [-(-(159 - gone) // SIZE) for gone in (0, 18, 31)]
    assert cached == sum(map(mul, (1, 3, 2), of_stages)) + NUM_GROUPS * (149 // SIZE)
