# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` with the plugin: its usual process tree, the OpenAI client, errors, counters."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from tests.checkpoints import sample_images
from tests.engines import DEEP_LAYER, SHALLOW_LAYER, Case
from tests.servers import picture_message, running
from tests.world import World

PICTURES = tuple(sample_images(6, seed=2))
QUESTION = "What is this?"


@contextmanager
def serving(checkpoint: Path, *flags: str, tensor_parallel: bool = False) -> Iterator[str]:
    """Run `vllm serve`; yields its base URL."""
    # One core for each of two workers; vLLM would want a NUMA node for each.
    cores = sorted(os.sched_getaffinity(0))
    environment = {
        "VLLM_PLUGINS": "himap,himap_stats",
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}" if tensor_parallel else "auto",
    }
    command = [
        str(Path(sys.executable).with_name("vllm")), "serve", str(checkpoint),
        "--served-model-name", "tiny",
        "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8",
        "--max-num-batched-tokens", "512", "--block-size", "32",
        "--kv-cache-memory-bytes", str(64 << 20),
        "--tensor-parallel-size", "2" if tensor_parallel else "1", *flags,
    ]  # fmt: skip
    with running(command, environment) as server:
        server.wait_for("/health")
        yield server.url


@pytest.fixture(scope="module")
def url(world: World) -> Iterator[str]:
    settings = {
        "himap": {
            "criterion": "himap",
            "shallow_layer": SHALLOW_LAYER,
            "deep_layer": DEEP_LAYER,
            "shallow_ratio": 0,
            "deep_ratio": 0,
            "max_deep_ratio": 0.8,
        }
    }
    flags = ("--additional-config", json.dumps(settings))
    with serving(world.checkpoint("gqa12"), *flags, tensor_parallel=True) as base:
        yield base


def stats(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/plugins/himap/stats", timeout=30) as response:
        counters: dict[str, Any] = json.load(response)
    return counters


def test_concurrent_chats_equal_the_oracle_on_two_tensor_parallel_workers(
    world: World, url: str
) -> None:
    """Heads are spread over two workers; both must keep the same tokens, the oracle's."""
    ratios = [(0.5, 0.75), (0, 0), (0.75, 0.25), (0.25, 0.5), (0.5, 0), None]
    cases = [
        Case(f"USER: <image>\n{QUESTION} ASSISTANT:", (picture,), pair, max_tokens=8)
        for picture, pair in zip(PICTURES, ratios, strict=True)
    ]

    async def ask(client: openai.AsyncOpenAI, case: Case) -> Any:
        keys = ("himap_shallow_ratio", "himap_deep_ratio")
        extra: dict[str, Any] = {"ignore_eos": True, "return_token_ids": True}
        if case.ratios is not None:
            extra["vllm_xargs"] = dict(zip(keys, case.ratios, strict=True))
        return await client.chat.completions.create(
            model="tiny",
            messages=[picture_message(case.images[0], QUESTION)],
            max_tokens=case.max_tokens,
            temperature=0,
            logprobs=True,
            extra_body=extra,
        )

    async def ask_all() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, case) for case in cases))

    before = stats(url)
    answers = asyncio.run(ask_all())
    for case, answer in zip(cases, answers, strict=True):
        expected = world.oracle("gqa12", case)
        assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
        (choice,) = answer.choices
        assert choice.token_ids == expected.tokens
        logprobs = [entry.logprob for entry in choice.logprobs.content]
        assert logprobs == pytest.approx(expected.logprobs, abs=2e-3)
    after = stats(url)
    assert after["requests"]["pruned"] - before["requests"].get("pruned", 0) == 4
    assert after["requests"]["unpruned"] - before["requests"].get("unpruned", 0) == 2
    assert after["image_tokens"] - before["image_tokens"] == 4 * 36
    assert after["kv_bytes_saved"] > before["kv_bytes_saved"]


@pytest.mark.parametrize(
    ("xargs", "parameter", "allowed"),
    [
        ({"himap_shallow_ratio": 1.0}, "himap_shallow_ratio", "[0, 1)"),
        ({"himap_shallow_ratio": -0.1}, "himap_shallow_ratio", "[0, 1)"),
        ({"himap_deep_ratio": 0.9}, "himap_deep_ratio", "[0, 0.8]"),
        ({"himap_deep_ratio": "0.5"}, "himap_deep_ratio", "must be a number in [0, 0.8]"),
        ({"himap_deep": 0.5}, "himap_deep", "himap_shallow_ratio, himap_deep_ratio"),
    ],
)
def test_errors_are_openai_shaped(
    url: str, xargs: dict[str, Any], parameter: str, allowed: str
) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(
            model="tiny",
            messages=[picture_message(PICTURES[0], QUESTION)],
            extra_body={"vllm_xargs": xargs},
        )
    body: Any = error.value.body
    assert body["param"] == parameter
    assert body["type"] == "BadRequestError"
    assert allowed in body["message"]


def test_an_image_of_a_refused_request_can_be_asked_about(url: str) -> None:
    """The engine never got it; vLLM's cache in the API process must not say that it did."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    ask: Any = partial(
        client.chat.completions.create,
        model="tiny",
        messages=[picture_message(Image.new("RGB", (84, 84), "teal"), QUESTION)],
        max_tokens=1,
    )
    with pytest.raises(openai.BadRequestError):
        ask(extra_body={"vllm_xargs": {"himap_shallow_ratio": 2}})
    assert ask().choices[0].finish_reason == "length"


def test_streaming(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    chunks = client.chat.completions.create(
        model="tiny",
        messages=[picture_message(PICTURES[0], QUESTION)],
        max_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={
            "ignore_eos": True,
            "vllm_xargs": {"himap_shallow_ratio": 0.5, "himap_deep_ratio": 0.75},
        },
    )
    usage = [chunk.usage for chunk in chunks if chunk.usage is not None]
    assert usage[-1].completion_tokens == 5


def test_an_engine_that_does_not_prune(world: World) -> None:
    """The plugin's endpoint says that pruning is off.

    Its first prompt has one token, in bfloat16: on a processor with AMX stock vLLM would die of it.
    """
    flags = ("--enforce-eager", "--dtype", "bfloat16")
    with serving(world.checkpoint("gqa12"), *flags) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        answer = client.completions.create(model="tiny", prompt=[50], max_tokens=2)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 1
        with pytest.raises(urllib.error.HTTPError) as error:
            stats(url)
    assert error.value.code == 404
