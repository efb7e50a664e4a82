# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, oracles and engines, each built once and shared by the tests.

Engines run in this process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`): they start in seconds, and tests
can look at the scheduler's own block tables. test_vllm_server.py runs the usual processes.
"""

from __future__ import annotations

import os

# Before anything imports vLLM or transformers.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small only lose by more threads

from tests import interpreter

if interpreter.WANTED:
    interpreter.enable()
else:
    collect_ignore = ["interpreted"]

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.checkpoints import build_llava
from tests.families import TINY
from tests.oracle import Oracle, OracleResult

SHALLOW_LAYER, DEEP_LAYER = 2, 8
BLOCK_SIZE = 32  # the smallest that vLLM's CPU attention takes
IMAGE_TOKENS = 36

SHAPES: dict[str, dict[str, Any]] = {
    "mha12": {"num_layers": 12, "num_heads": 4, "num_kv_heads": 4},
    "gqa12": {"num_layers": 12, "num_heads": 4, "num_kv_heads": 2},
    "mha32": {"num_layers": 32, "num_heads": 2, "num_kv_heads": 2, "hidden_size": 64},
}


@dataclass(frozen=True)
class Case:
    """One request: `ratios` None sends none."""

    prompt: str
    images: tuple[Image.Image, ...] = ()
    ratios: tuple[float, float] | None = None
    max_tokens: int = 6
    params: dict[str, Any] = field(default_factory=dict)


class Engine:
    """A vLLM engine in this process."""

    def __init__(self, checkpoint: Path, himap: dict[str, Any] | None, options: dict[str, Any]):
        from vllm import LLM

        defaults: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 512,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 512,
            "block_size": BLOCK_SIZE,
            "kv_cache_memory_bytes": 64 << 20,
            "limit_mm_per_prompt": {"image": 4},
            "mm_processor_cache_gb": 0,
            "seed": 0,
        }
        additional_config = {} if himap is None else {"himap": himap}
        self.llm = LLM(
            str(checkpoint), additional_config=additional_config, **{**defaults, **options}
        )

    @property
    def scheduler(self) -> Any:
        """The engine core's scheduler."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def stats(self) -> dict[str, Any]:
        """The plugin's counters."""
        stats: dict[str, Any] = self.llm.collective_rpc("himap_stats")[0]
        return stats

    def trace(self, request_id: str) -> dict[str, list[list[int]]]:
        """Surviving positions of one pruned prompt."""
        trace: dict[str, list[list[int]]] | None = self.llm.collective_rpc(
            "himap_trace", args=(request_id,)
        )[0]
        assert trace is not None
        return trace

    def prompt(self, case: Case) -> dict[str, Any]:
        """vLLM's prompt for a case."""
        prompt: dict[str, Any] = {"prompt": case.prompt}
        if case.images:
            prompt["multi_modal_data"] = {"image": list(case.images)}
        return prompt

    def params(self, case: Case) -> Any:
        """vLLM's sampling parameters for a case: greedy, with log-probabilities."""
        from vllm import SamplingParams

        args = {}
        if case.ratios is not None:
            args = dict(zip(("himap_shallow_ratio", "himap_deep_ratio"), case.ratios, strict=True))
        settings: dict[str, Any] = {
            "temperature": 0,
            "max_tokens": case.max_tokens,
            "ignore_eos": True,
            "logprobs": 0,
            "extra_args": args,
            **case.params,
        }
        return SamplingParams(**settings)

    def generate(self, cases: Sequence[Case]) -> list[Any]:
        """Run all cases as one batch."""
        outputs: list[Any] = self.llm.generate(
            [self.prompt(case) for case in cases],
            [self.params(case) for case in cases],
            use_tqdm=False,
        )
        return outputs


class World:
    """What the tests share, built when first asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._oracles: dict[str, Oracle] = {}
        self._engines: dict[str, Engine] = {}
        self._answers: dict[tuple[str, str, int], OracleResult] = {}
        self._cases: list[Case] = []  # keeps the ids in _answers from being reused

    def checkpoint(self, shape: str) -> Path:
        """A tiny random-weight model: one of `SHAPES`, LLaVA-1.5, or of `TINY`."""
        path = self._directory / shape
        if not path.exists():
            if shape in TINY:
                path.mkdir()
                TINY[shape].build(path)
            else:
                build_llava(path, image_size=84, patch_size=14, **SHAPES[shape])
        return path

    def engine(
        self, shape: str = "mha12", *, himap: dict[str, Any] | None = None, **options: Any
    ) -> Engine:
        """An engine with pruning; `himap` adds to the settings.

        `compiled=True` leaves vLLM's default compilation on, a minute for each set of options;
        beside Triton's interpreter that is compilation and CUDA graphs as on a GPU.
        """
        settings = {
            "shallow_layer": SHALLOW_LAYER,
            "deep_layer": DEEP_LAYER,
            "trace_requests": 64,
            **(himap or {}),
        }
        return self._engine(shape, settings, options)

    def stock(self, shape: str = "mha12", **options: Any) -> Engine:
        """The same engine without pruning."""
        return self._engine(shape, None, options)

    def _engine(self, shape: str, himap: dict[str, Any] | None, options: dict[str, Any]) -> Engine:
        compiled = options.pop("compiled", False)
        if compiled:
            options["enforce_eager"] = False
        key = repr((shape, himap, sorted(options.items())))
        if key not in self._engines:
            build = partial(Engine, self.checkpoint(shape), himap)
            if compiled and interpreter.WANTED:
                from tests.interpreted.cuda_graphs import engine_with_graphs

                self._engines[key] = engine_with_graphs(build, options)
            else:
                self._engines[key] = build(options)
        return self._engines[key]

    def oracle(self, shape: str, case: Case, criterion: str = "himap") -> OracleResult:
        """The oracle's answer to a case."""
        key = (shape, criterion, id(case))
        if key not in self._answers:
            if shape not in self._oracles:
                self._oracles[shape] = Oracle(self.checkpoint(shape), SHALLOW_LAYER, DEEP_LAYER)
            shallow, deep = case.ratios or (0.0, 0.0)
            self._cases.append(case)
            oracle = self._oracles[shape]
            oracle.criterion = criterion
            self._answers[key] = oracle.generate(
                case.prompt, case.images, shallow, deep, case.max_tokens
            )
        return self._answers[key]


@contextmanager
def watched(engine: Engine, look: Any) -> Iterator[None]:
    """Call `look(scheduler_output)` after every scheduled step."""
    scheduler = engine.scheduler
    schedule = scheduler.schedule

    def watching(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        look(output)
        return output

    scheduler.schedule = watching
    try:
        yield
    finally:
        del scheduler.schedule


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("checkpoints"))


def assert_equals_oracle(
    world: World, engine: Engine, shape: str, case: Case, output: Any, criterion: str = "himap"
) -> None:
    """Same prompt, same kept sets, same tokens, log-probabilities within 2e-3."""
    expected = world.oracle(shape, case, criterion)
    assert list(output.prompt_token_ids) == expected.prompt_token_ids
    if case.images and case.ratios not in (None, (0, 0)):
        trace = engine.trace(output.request_id)
        assert trace["shallow"] == expected.kept_shallow
        assert trace["deep"] == expected.kept_deep
    (completion,) = output.outputs
    assert list(completion.token_ids) == expected.tokens
    logprobs = [
        step[token].logprob
        for step, token in zip(completion.logprobs, completion.token_ids, strict=True)
    ]
    assert logprobs == pytest.approx(expected.logprobs, abs=2e-3)


compiled_or_not = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
