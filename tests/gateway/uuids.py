# SPDX-License-Identifier: Apache-2.0
"""Images by `uuid`, checked at a server with API keys; test_access.py has the server."""

from __future__ import annotations

import base64
import hashlib
import io
from typing import Any

from tests.gateway.guarded import Guarded
from tests.gateway.images import PICTURES
from tests.gateway.test_api import QUESTION


def named(uuid: Any, url: str | None = None, api: str = "chat/completions") -> Any:
    """Path and body of a request with an image and its name."""
    body: dict[str, Any] = {"model": "tiny", "temperature": 0, "himap": {"enabled": True}}
    if api == "responses":
        part: dict[str, Any] = {"type": "input_image", "image_url": url, "uuid": uuid}
        body |= {"max_output_tokens": 8, "input": [{"role": "user", "content": [part]}]}
        return f"/v1/{api}", body
    part = {"type": "image_url", "image_url": url and {"url": url}, "uuid": uuid}
    content = [part, {"type": "text", "text": QUESTION}]
    return f"/v1/{api}", {
        **body,
        "max_tokens": 8,
        "messages": [{"role": "user", "content": content}],
    }


def data_url(picture: int) -> str:
    buffer = io.BytesIO()
    PICTURES[picture].save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def check_names(guarded: Guarded) -> None:
    """Each key has names of its own, and a name is the last image under it."""

    def ask(uuid: Any, url: str | None = None, key: str = "plain") -> Any:
        path, body = named(uuid, url)
        status, _, answer = guarded.post(body, key, path)
        if status != 200:
            return status, answer["error"]
        return answer["choices"][0]["message"]["content"]

    def refused(uuid: str, key: str) -> bool:
        status, error = ask(uuid, key=key)
        assert (error["param"], error["code"]) == (
            "messages[0].content[0].uuid",
            "image_file_not_found",
        )
        return bool(status == 400 and "send the image" in error["message"])

    assert refused("a", "plain")
    first = ask("a", data_url(0))
    assert ask("a") == first == ask(None, data_url(0))
    # Another key has names of its own, and no way to this one's.
    assert refused("a", "single")
    other = ask("a", data_url(1), "single")
    assert other != first
    assert (ask("a"), ask("a", key="single")) == (first, other)
    # A name is the last image.
    second = ask("a", data_url(2))
    assert second not in (first, other)
    assert (ask("a"), ask("a", key="single")) == (second, other)
    assert ask("a", "data:image/png;base64,AAAA")[0] == 400
    assert ask("a") == second
    for wrong in ("", 5, "x" * 257, ["a"]):
        status, error = ask(wrong, data_url(0))
        assert (status, error["param"]) == (400, "messages[0].content[0].uuid")
    # vLLM names images by their content; a client may not.
    assert refused(hashlib.sha256(base64.b64decode(data_url(0).split(",")[1])).hexdigest(), "plain")


def check_forms(guarded: Guarded) -> None:
    """However a client writes an image that it leaves out."""

    def images(*parts: Any) -> Any:
        path, body = named(None)
        question = {"type": "text", "text": QUESTION}
        body["messages"][0]["content"] = [*parts, question]
        status, _, answer = guarded.post(body, path=path)
        assert status == 200, (parts, answer)
        return answer["usage"]["himap"]["images"]

    part = {"type": "image_url", "uuid": "b"}
    wanted = images({**part, "image_url": {"url": data_url(0)}})
    for image in (None, {}, {"url": None}, ""):
        assert images({**part, "image_url": image}) == wanted
    for bare in (part, {"image_url": None, "uuid": "b"}):
        assert images(bare) == wanted
    # Later parts name what earlier ones bring; a `detail` is of its own part.
    first = {"type": "image_url", "image_url": {"url": data_url(1)}, "uuid": "c"}
    second = {"type": "image_url", "image_url": {"detail": "high"}, "uuid": "c"}
    assert [image["detail"] for image in images(first, second)] == ["auto", "high"]
    path, body = named("c", api="responses")
    status, _, answer = guarded.post(body, path=path)
    assert status == 200, answer
    assert answer["usage"]["himap"]["image_tokens"] == 36
    # No way past the check of media by a text's uuid.
    text = {"type": "text", "text": "hi", "image_url": None, "uuid": "c"}
    body = {"model": "tiny", "messages": [{"role": "user", "content": [text]}]}
    assert guarded.post(body, path="/v1/chat/completions")[0] == 400
