# SPDX-License-Identifier: Apache-2.0
"""Half of a surrogate pair is no character: wherever it stands, and however it is encoded."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.gateway.support import post
from tests.servers import Server

HALF = "a\ud83d"
MESSAGES = [{"role": "user", "content": "a"}]
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 1}
CHAT: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 1}
RESPONSES: dict[str, Any] = {"model": "tiny", "input": "a", "max_output_tokens": 1}

FIELDS = {
    "prompt": ("/v1/completions", {**TEXT, "prompt": HALF}),
    "stop": ("/v1/completions", {**TEXT, "stop": [HALF]}),
    "stop in a stream": ("/v1/completions", {**TEXT, "stop": [HALF], "stream": True}),
    "bad_words": ("/v1/completions", {**TEXT, "bad_words": [HALF]}),
    "vllm_xargs": ("/v1/completions", {**TEXT, "vllm_xargs": {"a": HALF}}),
    "key of vllm_xargs": ("/v1/completions", {**TEXT, "vllm_xargs": {HALF: 1}}),
    "model": ("/v1/completions", {**TEXT, "model": HALF}),
    "request_id": ("/v1/completions", {**TEXT, "request_id": HALF}),
    "user": ("/v1/chat/completions", {**CHAT, "user": HALF}),
    "content": ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": HALF}]}),
    "stream": ("/v1/chat/completions", {**CHAT, "stop": HALF, "stream": True}),
    "unknown field": ("/v1/chat/completions", {**CHAT, HALF: 1}),
    "input": ("/v1/responses", {**RESPONSES, "input": HALF}),
    "metadata": ("/v1/responses", {**RESPONSES, "metadata": {"a": HALF}}),
}


def encodings(body: Any) -> dict[str, bytes]:
    text = json.dumps(body, ensure_ascii=False)
    return {
        "escaped": json.dumps(body).encode(),
        "utf-8": text.encode(errors="surrogatepass"),
        "utf-8 with a mark": b"\xef\xbb\xbf" + text.encode(errors="surrogatepass"),
        "utf-16": text.encode("utf-16-le", "surrogatepass"),
        "escaped in utf-16": json.dumps(body).encode("utf-16-be"),
        "utf-32": text.encode("utf-32-le", "surrogatepass"),
    }


@pytest.mark.parametrize("field", FIELDS)
def test_half_a_surrogate_pair_is_refused(server: Server, field: str) -> None:
    path, body = FIELDS[field]
    for encoding, data in encodings(body).items():
        status, _, answer = post(server, path, data)
        error = answer["error"]
        assert (status, "half of a surrogate pair" in error["message"]) == (400, True), encoding


def test_whole_pairs_are_characters(server: Server) -> None:
    for encoding, data in encodings(
        {**TEXT, "prompt": "a\U0001f600", "stop": "\U0001f600"}
    ).items():
        status, _, answer = post(server, "/v1/completions", data)
        assert status == 200, (encoding, answer)


@pytest.mark.parametrize("data", [b'{"prompt": "\xff"}', b'{"prompt": "\xc3"}', b"\xff\xfe\0"])
def test_bytes_that_are_no_text(server: Server, data: bytes) -> None:
    status, _, answer = post(server, "/v1/completions", data)
    assert (status, answer["error"]["message"]) == (400, "the body is not UTF-8")
