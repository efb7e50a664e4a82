# SPDX-License-Identifier: Apache-2.0
"""Starting the gateway, and talking to it."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.engines import DEEP_LAYER, SHALLOW_LAYER
from tests.oracle import OracleResult
from tests.servers import Server, running

HIMAP = str(Path(sys.executable).with_name("himap"))


@contextmanager
def gateway(
    checkpoint: Path,
    *flags: str,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
    himap: Sequence[str] = (HIMAP,),
) -> Iterator[Server]:
    """Run `himap serve`, with the criterion that is the oracle's default."""
    command = [
        *himap, "serve", str(checkpoint),
        "--served-model-name", "tiny", "--enforce-eager",
        "--shallow-layer", str(SHALLOW_LAYER), "--deep-layer", str(DEEP_LAYER),
        "--max-deep-ratio", "0.9", "--criterion", "himap",
        "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8",
        "--block-size", "32", "--kv-cache-memory-bytes", str(64 << 20), *flags,
    ]  # fmt: skip
    with running(command, environment or {}, log) as server:
        yield server


def post(server: Server, path: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
    """Status, headers and JSON body of a raw POST."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        f"{server.url}{path}", data, {"content-type": "application/json", **headers}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.load(error)


def client(server: Server, key: str = "none") -> openai.OpenAI:
    """The real client, which shows errors at once."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def answer_as_the_oracle(
    server: Server, messages: Sequence[Any], expected: OracleResult
) -> dict[str, Any]:
    """Ask for a greedy chat answer at (0.5, 0.75), compare, and return its `usage.himap`."""
    answer = client(server).chat.completions.create(
        model="tiny",
        messages=messages,
        max_tokens=len(expected.tokens),
        temperature=0,
        logprobs=True,
        extra_body={
            "himap": {"shallow_ratio": 0.5, "deep_ratio": 0.75},
            "ignore_eos": True,
            "return_token_ids": True,
        },
    )
    choice: Any = answer.choices[0]
    assert choice.token_ids == expected.tokens
    logprobs = [entry.logprob for entry in choice.logprobs.content]
    assert logprobs == pytest.approx(expected.logprobs, abs=2e-3)
    usage: Any = answer.usage
    assert usage.prompt_tokens == len(expected.prompt_token_ids)
    assert usage.himap["kept_shallow"] == sum(map(len, expected.kept_shallow))
    assert usage.himap["kept_deep"] == sum(map(len, expected.kept_deep))
    himap: dict[str, Any] = usage.himap
    return himap


def metric(server: Server, name: str) -> float:
    """Sum of the metric's series whose text begins with `name`."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))
