# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters that OpenAI accepts are those of what they mean."""

from __future__ import annotations

from typing import Any

import pytest
from himap_server.schemas import ChatRequest, ResponsesBody, TextRequest
from vllm.sampling_params import SamplingParams

BODIES: list[tuple[Any, dict[str, Any]]] = [
    (ChatRequest, {"messages": [{"role": "user", "content": "hi"}]}),
    (TextRequest, {"prompt": "hi"}),
    (ResponsesBody, {"input": "hi"}),
]
SEVERAL = BODIES[:2]


def sampling(model: Any, body: dict[str, Any]) -> SamplingParams:
    request = model.model_validate({"model": "m", **body}, from_attributes=True)
    params: SamplingParams = request.to_sampling_params(8, {})
    return params


@pytest.mark.parametrize(("model", "body"), BODIES)
def test_a_top_p_of_zero_is_greedy(model: Any, body: dict[str, Any]) -> None:
    for zero in (0, 0.0):
        params = sampling(model, {**body, "top_p": zero, "top_k": 5})
        assert (params.top_k, params.top_p) == (1, 1.0)
    params = sampling(model, {**body, "top_p": 0.5, "top_k": 5})
    assert (params.top_k, params.top_p) == (5, 0.5)
    with pytest.raises(Exception, match="top_p"):
        sampling(model, {**body, "top_p": -0.1})


@pytest.mark.parametrize(("model", "body"), SEVERAL)
def test_several_greedy_answers(model: Any, body: dict[str, Any]) -> None:
    params = sampling(model, {**body, "temperature": 0, "n": 2})
    assert (params.n, params.top_k) == (2, 1)
    params = sampling(model, {**body, "temperature": 0, "n": 1})
    assert params.temperature == 0
    params = sampling(model, {**body, "temperature": 0.5, "n": 2, "top_k": 7})
    assert (params.temperature, params.top_k) == (0.5, 7)


def test_an_echo_in_a_chat_asks_for_no_log_probabilities() -> None:
    model, body = BODIES[0]
    assert sampling(model, {**body, "echo": True}).prompt_logprobs is None
    echo = {"echo": True, "logprobs": True, "top_logprobs": 2}
    params = sampling(model, {**body, **echo})
    assert (params.prompt_logprobs, params.logprobs) == (None, 2)
    assert sampling(model, {**body, "echo": True, "prompt_logprobs": 1}).prompt_logprobs == 1
