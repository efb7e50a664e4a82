# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, oracles and engines, each built once and shared by the tests of a process."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from himap_vllm.plan.prior import PositionPrior, describe_model
from tests import interpreter
from tests.checkpoints import build_llava
from tests.engines import DEEP_LAYER, SHALLOW_LAYER, Case, Engine
from tests.families import TINY
from tests.oracle import Oracle, OracleResult

SHAPES: dict[str, dict[str, Any]] = {
    "mha12": {"num_layers": 12, "num_heads": 4, "num_kv_heads": 4},
    "gqa12": {"num_layers": 12, "num_heads": 4, "num_kv_heads": 2},
    "mha32": {"num_layers": 32, "num_heads": 2, "num_kv_heads": 2, "hidden_size": 64},
}


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
        """An engine with pruning by HiMAP's criterion; `himap` adds to the settings.

        `compiled=True` leaves vLLM's default compilation on, a minute for each set of options;
        beside Triton's interpreter that is compilation and CUDA graphs as on a GPU.
        """
        settings = {
            "shallow_layer": SHALLOW_LAYER,
            "deep_layer": DEEP_LAYER,
            "trace_requests": 64,
            "criterion": "himap",  # the oracle's default, too
            **(himap or {}),
        }
        if "debiased" in str(settings.get("criterion")):
            settings["position_prior"] = str(self.prior(shape))
        return self._engine(shape, settings, options)

    def stock(self, shape: str = "mha12", **options: Any) -> Engine:
        """The same engine without pruning."""
        return self._engine(shape, None, options)

    def prior(self, shape: str) -> Path:
        """A positional prior of other sizes than the images, for the cuts of the tests."""
        path = self.checkpoint(shape) / "prior.json"
        if not path.exists():
            config = AutoConfig.from_pretrained(path.parent).get_text_config()
            draws = np.random.default_rng(0)
            layers = {
                layer: draws.uniform(0.25, 4, size).astype(np.float32)
                for layer, size in ((SHALLOW_LAYER, 20), (DEEP_LAYER, 36))
            }
            PositionPrior(describe_model(config), layers).write(path)
        return path

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
            oracle.votes = case.votes or "turn"
            if "debiased" in criterion:
                oracle.prior = json.loads(self.prior(shape).read_text())["layers"]
            self._answers[key] = oracle.generate(
                case.prompt, case.images, shallow, deep, case.max_tokens
            )
        return self._answers[key]


def assert_equals_oracle(
    world: World, engine: Engine, shape: str, case: Case, output: Any, criterion: str = "himap"
) -> None:
    """Same prompt, same kept sets, same tokens, log-probabilities within 2e-3.

    Nothing is known of the kept sets of images that the prefix cache had.
    """
    expected = world.oracle(shape, case, criterion)
    assert list(output.prompt_token_ids) == expected.prompt_token_ids
    if case.images and case.ratios not in (None, (0, 0)):
        computed = output.num_cached_tokens or 0
        found = [positions[-1] < computed for positions in expected.kept_shallow]
        if not all(found):
            trace = engine.trace(output.request_id)
            for kept, wanted in (
                (trace["shallow"], expected.kept_shallow),
                (trace["deep"], expected.kept_deep),
            ):
                for own, positions, in_cache in zip(kept, wanted, found, strict=True):
                    assert own == positions or in_cache
    (completion,) = output.outputs
    assert list(completion.token_ids) == expected.tokens
    logprobs = [
        step[token].logprob
        for step, token in zip(completion.logprobs, completion.token_ids, strict=True)
    ]
    assert logprobs == pytest.approx(expected.logprobs, abs=2e-3)


# Compiled engines take a minute to start, so tests of several files share them, and a worker.
_COMPILED = pytest.param(True, id="compiled", marks=pytest.mark.xdist_group("compiled"))
compiled_or_not = pytest.mark.parametrize("compiled", [pytest.param(False, id="eager"), _COMPILED])
