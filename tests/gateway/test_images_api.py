# SPDX-License-Identifier: Apache-2.0
"""Images on their way through the whole gateway; test_image_checks.py in unit has each check.

The advisories are those of vLLM's history: each was a hole in a server like this.
"""

from __future__ import annotations

import base64
import io
import time
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from tests.checkpoints import IMAGE_ID
from tests.gateway.clients import savings
from tests.gateway.images import PICTURES, ImageHost
from tests.gateway.support import client, metric, post
from tests.gateway.test_api import MESSAGES, QUESTION
from tests.servers import Server

DATA_URL: str = MESSAGES[0]["content"][0]["image_url"]["url"]


def ask(server: Server, *parts: Any, **extra: Any) -> Any:
    messages: Any = [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]
    return client(server).chat.completions.create(
        model="tiny", messages=messages, max_tokens=8, temperature=0, **extra
    )


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def encoded(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def test_an_image_from_a_url_is_the_same_as_its_data(server: Server, image_host: ImageHost) -> None:
    fetches = metric(server, "himap_image_fetch_seconds_count")
    decodes = metric(server, "himap_image_decode_seconds_count")
    by_url = ask(server, image_part(image_host.url("0.png")))
    by_data = ask(server, image_part(DATA_URL))
    assert by_url.choices[0].message.content == by_data.choices[0].message.content
    assert by_url.usage.prompt_tokens == by_data.usage.prompt_tokens
    assert savings(by_url.usage.himap) == savings(by_data.usage.himap)
    assert by_url.usage.himap["kept_deep"] == 5
    assert metric(server, "himap_image_fetch_seconds_count") == fetches + 1
    assert metric(server, "himap_image_decode_seconds_count") == decodes + 2
    other = ask(server, image_part(image_host.url("1.png")))
    assert other.choices[0].message.content != by_url.choices[0].message.content


def test_responses_api_takes_images_both_ways(server: Server, image_host: ImageHost) -> None:
    texts = set()
    for url in (image_host.url("2.png"), f"data:image/png;base64,{encoded(PICTURES[2], 'PNG')}"):
        content: Any = [
            {"type": "input_image", "image_url": url, "detail": "auto"},
            {"type": "input_text", "text": QUESTION},
        ]
        answer: Any = client(server).responses.create(
            model="tiny",
            input=[{"role": "user", "content": content}],
            max_output_tokens=8,
            temperature=0,
            extra_body={"himap": {"deep_ratio": 0}},
        )
        texts.add(answer.output_text)
        assert answer.usage.himap["kept_deep"] == 18
    assert len(texts) == 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_the_four_formats(server: Server, kind: str) -> None:
    url = f"data:image/{kind.lower()};base64,{encoded(PICTURES[0], kind)}"
    assert ask(server, image_part(url)).usage.himap["image_tokens"] == 36


def test_16_bit_gray_is_as_its_8_bit_copy(server: Server) -> None:
    """It was a white square."""
    gray = np.asarray(PICTURES[0].convert("L"))
    wide = Image.fromarray(gray.astype(np.uint16) << 8)
    texts = [
        ask(server, image_part(f"data:image/png;base64,{encoded(image, 'PNG')}"), logprobs=True)
        for image in (Image.fromarray(gray), wide, Image.new("L", wide.size, 255))
    ]
    copy, scan, white = (answer.choices[0].logprobs.content[0].logprob for answer in texts)
    assert scan == pytest.approx(copy, abs=1e-5)
    assert abs(white - copy) > 1e-4


def test_an_image_server_that_stalls(server: Server, image_host: ImageHost) -> None:
    begun = time.monotonic()
    with pytest.raises(openai.BadRequestError, match="2 s"):
        ask(server, image_part(image_host.url("stall")))
    assert time.monotonic() - begun < 10
    assert ask(server, image_part(DATA_URL)).usage.himap


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("http://127.0.0.1:1/0.png", id="loopback"),
        pytest.param("http://169.254.169.254/latest/meta-data/x.png", id="GHSA-3f6c-7fw2-ppm4"),
        pytest.param("http://10.0.0.1\\@example.com/0.png", id="CVE-2026-24779"),
        pytest.param("redirect", id="vllm-57157-redirect-to-a-private-address"),
        pytest.param("file:///etc/hostname", id="file"),
        pytest.param("data:image/svg+xml;base64,PHN2Zy8+", id="svg"),
        pytest.param("data:video/jpeg;base64,AAAA", id="GHSA-pq5c-rjhq-qp7p"),
        pytest.param("DATA:text/html,hello", id="html"),
        pytest.param("", id="empty"),
    ],
)
def test_urls_that_are_refused(server: Server, image_host: ImageHost, url: str) -> None:
    url = image_host.url(url) if url == "redirect" else url
    parts: list[dict[str, Any]] = [
        image_part(url),
        {"image_url": url},
        {"type": "input_image", "image_url": url},
        # vLLM goes by the keys as soon as there is a uuid.
        {"type": "text", "text": "hi", "uuid": "u", "image_url": url},
    ]
    for part, extra in [*((part, {}) for part in parts), (parts[0], {"task": 1})]:
        # A field of a wrong type makes validation leave the content as an iterator.
        message = {"role": "user", "content": [part], **extra}
        for path, body in (
            ("/v1/chat/completions", {"messages": [message]}),
            ("/v1/responses", {"input": [message]}),
        ):
            status, _, answer = post(server, path, {"model": "tiny", **body})
            assert status == 400
            text = answer["error"]["message"]
            assert "image" in text
            assert "127.0.0.1" not in text
            assert answer["error"]["param"].endswith(("content[0]", "content[0].uuid"))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url", "video_url": {"url": DATA_URL}},
        {"type": "text", "text": "hi", "video_url": DATA_URL},
        {"type": "audio_url", "audio_url": {"url": DATA_URL}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "image_embeds", "image_embeds": "AAAA"},
        {"type": "image_pil", "image_pil": None},
        {"type": "file", "file": {"file_id": "x"}},
        {"type": "input_file", "file_url": "http://127.0.0.1:1/"},
        {"type": "input_image", "file_id": "x"},
        {"image_url": None},
        # vLLM would leave the image out.
        {"type": "text", "text": "hi", "image_url": {"url": DATA_URL, "detail": "low"}},
        {"type": "input_text", "text": "hi", "image_url": DATA_URL},
        # Whoever knows it would get what another client sent under it.
        {"type": "image_url", "image_url": None, "uuid": "someone-elses"},
    ],
)
def test_other_media_are_refused(server: Server, part: dict[str, Any]) -> None:
    for field, path in (("messages", "/v1/chat/completions"), ("input", "/v1/responses")):
        item = {"role": "user", "content": [part]}
        status, _, answer = post(server, path, {"model": "tiny", field: [item]})
        assert (status, answer["error"]["param"].split(".")[0]) == (400, f"{field}[0]")
    result = {"type": "function_call_output", "call_id": "c", "output": [part]}
    status, _, answer = post(server, "/v1/responses", {"model": "tiny", "input": [result]})
    assert (status, answer["error"]["param"].split(".")[0]) == (400, "input[0]")


@pytest.mark.parametrize(
    ("data", "names"),
    [
        pytest.param(b"\x00" * 100, "PNG, JPEG, WebP or GIF", id="no-image"),
        # Declared as PNG, decoded by content: JPEG 2000 and TIFF must not reach the decoder.
        pytest.param(b"\x00\x00\x00\x0cjP  \r\n\x87\n" * 9, "PNG, JPEG", id="CVE-2026-22778-jp2"),
        pytest.param(b"II*\x00" + b"\x00" * 50, "PNG, JPEG", id="tiff"),
    ],
)
def test_content_decides_not_the_declared_type(server: Server, data: bytes, names: str) -> None:
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    with pytest.raises(openai.BadRequestError, match=names):
        ask(server, image_part(url))


def test_what_the_decoder_says_stays_inside(server: Server) -> None:
    """CVE-2026-22778: error texts of the decoder told of its memory."""
    picture = PICTURES[0].resize((200, 200))
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        data = base64.b64decode(encoded(picture, kind))
        for cut in (len(data) // 2, len(data) * 9 // 10):
            broken = data[:cut] + (b"" if kind == "JPEG" else b"\x55" * 40)
            url = f"data:image/png;base64,{base64.b64encode(broken).decode()}"
            status, _, answer = post(
                server,
                "/v1/chat/completions",
                {"model": "tiny", "messages": [{"role": "user", "content": [image_part(url)]}]},
            )
            # A decoder may make something of what there is.
            assert status in (200, 400)
            if status == 400:
                message = answer["error"]["message"]
                assert message in (
                    "an image can't be decoded",
                    "the image is damaged; save it again",
                )


def test_fields_that_are_null_are_not_there(server: Server) -> None:
    """Clients send what their classes have."""
    text = {"type": "text", "text": "hi", "image_url": None, "input_audio": None, "uuid": None}
    assert ask(server, {**image_part(DATA_URL), "text": None, "uuid": None}, text).usage.himap


def test_images_of_a_request_together(server: Server) -> None:
    """One can be within the limits, and sixteen of it too much for the memory."""
    large = encoded(Image.new("1", (4999, 4999)), "PNG")  # odd: it cannot be scaled down
    part = image_part(f"data:image/png;base64,{large}")
    with pytest.raises(openai.BadRequestError, match="200000000 pixels together"):
        ask(server, *[part] * 9)


def test_photos_of_a_phone(server: Server) -> None:
    """Five have more pixels than one image may have."""
    photo = encoded(PICTURES[0].resize((4032, 3024)), "JPEG", quality=60)
    part = image_part(f"data:image/jpeg;base64,{photo}")
    answer = ask(server, *[part] * 5)
    assert answer.usage.himap["image_tokens"] == 5 * 36


def test_sizes(server: Server) -> None:
    """CVE-2026-22773: an image of one pixel; vLLM PR 47010: one of too many."""
    with pytest.raises(openai.BadRequestError, match="8"):
        ask(server, image_part(f"data:image/png;base64,{encoded(Image.new('RGB', (1, 1)), 'PNG')}"))
    bomb = encoded(Image.new("1", (9000, 9000)), "PNG")
    with pytest.raises(openai.BadRequestError, match="pixels"):
        ask(server, image_part(f"data:image/png;base64,{bomb}"))
    with pytest.raises(openai.BadRequestError, match="at most 16"):
        ask(server, *[image_part(DATA_URL)] * 17)


@pytest.mark.parametrize("with_image", [False, True])
def test_placeholders_in_text_are_refused(server: Server, with_image: bool) -> None:
    """CVE-2026-44222: the text of an image's token was taken for an image."""
    images = [image_part(DATA_URL)] * with_image
    bodies = [
        {"messages": [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]}
        # The second is the token only when the template has put its parts together.
        for text in ("What is <image>?", "a <image><image> b")
    ]
    bodies.append({"messages": [{"role": "user", "content": "hi <image>", "name": "x"}]})
    bodies.append({"messages": MESSAGES, "tools": [_tool("reads <image>")]})
    bodies.append({"messages": [{"role": "system", "content": "<image>"}, *MESSAGES]})
    for body in bodies:
        status, _, answer = post(server, "/v1/chat/completions", {"model": "tiny", **body})
        assert (status, "stands for an image" in answer["error"]["message"]) == (400, True)


def test_placeholders_may_be_stop_strings(server: Server) -> None:
    assert ask(server, image_part(DATA_URL), stop=["<image>"]).usage.himap


def test_placeholders_put_together_from_pieces_are_refused(server: Server) -> None:
    pieces = [{"type": "text", "text": text} for text in ("<ima", "ge>")]
    for parts in ([*pieces, image_part(DATA_URL)], [image_part(DATA_URL), *pieces], pieces):
        status, _, answer = post(
            server,
            "/v1/chat/completions",
            {"model": "tiny", "messages": [{"role": "user", "content": parts}]},
        )
        assert (status, "belong to no image" in answer["error"]["message"]) == (400, True)


def test_placeholders_in_text_completions_are_refused(server: Server) -> None:
    status, _, answer = post(server, "/v1/completions", {"model": "tiny", "prompt": "hi <image>"})
    assert (status, answer["error"]["param"]) == (400, "prompt")
    tokens = client(server).completions.create(
        model="tiny", prompt="hi", max_tokens=1, extra_body={"return_token_ids": True}
    )
    ids: Any = tokens.choices[0].prompt_token_ids  # type: ignore[attr-defined]
    for prompt in ([*ids, IMAGE_ID], [[*ids], [IMAGE_ID]]):
        status, _, answer = post(server, "/v1/completions", {"model": "tiny", "prompt": prompt})
        assert (status, "belong to no image" in answer["error"]["message"]) == (400, True)


def _tool(description: str) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": "f", "description": description, "parameters": {"type": "object"}},
    }
