# SPDX-License-Identifier: Apache-2.0
"""Asks a served model questions, many at a time, and collects the answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import openai
from tqdm import tqdm

from himap_vllm.plan.prompt import Ratios

from .errors import CommandError
from .items import Item, conversations

_RETRIES = 8  # by the client, with growing pauses, after 429, 5xx and connection errors


UNPRUNED = Ratios(0.0, 0.0)
HISTORIES = ("own", "reference")


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one question.

    Attributes:
        text: the answer.
        ttft: seconds to the first token.
        latency: seconds to the last token.
        prompt_tokens: the server's count, image tokens included.
        usage: the `himap` object of the usage, if the server sends one.
        error: why there is no answer.
    """

    text: str
    ttft: float = 0.0
    latency: float = 0.0
    prompt_tokens: int = 0
    usage: dict[str, Any] | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A served model.

    Attributes:
        url: URL of the API, up to `/v1`.
        model: name of the model at this URL.
        api_key: any text if the server needs no key.
        xargs: send the ratios as `vllm_xargs`, as a plain `vllm serve` takes them.
        max_tokens: longest answer.
        history: whose answers later questions of a conversation see: the model's `own` at the same
            ratios, or the `reference`, the first accepted one.
    """

    url: str
    model: str
    api_key: str
    xargs: bool = False
    max_tokens: int = 64
    history: str = HISTORIES[0]

    def extra_body(self, ratios: Ratios) -> dict[str, Any]:
        """The fields of a request that name the ratios."""
        if self.xargs:
            return {
                "vllm_xargs": {
                    "himap_shallow_ratio": ratios.shallow,
                    "himap_deep_ratio": ratios.deep,
                }
            }
        return {"himap": {"shallow_ratio": ratios.shallow, "deep_ratio": ratios.deep}}


def first_model(url: str, api_key: str) -> str:
    """Name of the first model that an endpoint serves.

    Raises:
        CommandError: the endpoint serves no model, or does not answer.
    """
    try:
        with openai.OpenAI(base_url=url, api_key=api_key, max_retries=1) as client:
            return client.models.list().data[0].id
    except (openai.APIError, IndexError) as error:
        raise CommandError(f"{url} does not answer: {error}") from error


def ask_all(
    endpoint: Endpoint,
    items: Sequence[Item],
    settings: Sequence[Ratios],
    concurrency: int,
    quiet: bool = False,
) -> dict[Ratios, list[Answer]]:
    """Ask every question at every setting; the answers are in the order of the items."""
    return asyncio.run(_ask_all(endpoint, items, settings, concurrency, quiet))


async def _ask_all(
    endpoint: Endpoint,
    items: Sequence[Item],
    settings: Sequence[Ratios],
    concurrency: int,
    quiet: bool,
) -> dict[Ratios, list[Answer]]:
    answers: dict[Ratios, list[Answer]] = {
        ratios: [Answer("", error="not asked")] * len(items) for ratios in settings
    }
    # The first request for an image pays for encoding it: settings take turns at being first.
    jobs = iter([
        (chain, settings[(number + turn) % len(settings)])
        for number, chain in enumerate(conversations(items))
        for turn in range(len(settings))
    ])  # fmt: skip
    client = openai.AsyncOpenAI(
        base_url=endpoint.url, api_key=endpoint.api_key, max_retries=_RETRIES
    )
    async with client:
        for ratios in settings:  # the first requests may wait for a compilation
            await _ask(client, endpoint, [_user_turn(items[0], True)], ratios)
        total = len(items) * len(settings)
        with tqdm(total=total, unit="answer", disable=quiet) as progress:

            async def work() -> None:
                for chain, ratios in jobs:
                    asked = [items[index] for index in chain]
                    found = await _converse(client, endpoint, asked, ratios)
                    for index, answer in zip(chain, found, strict=True):
                        answers[ratios][index] = answer
                    progress.update(len(chain))

            await asyncio.gather(*(work() for _ in range(concurrency)))
    return answers


def _user_turn(item: Item, with_image: bool) -> dict[str, Any]:
    content: list[Any] = [{"type": "text", "text": item.question}]
    if with_image:
        content.insert(0, {"type": "image_url", "image_url": {"url": item.image_url()}})
    return {"role": "user", "content": content}


async def _converse(
    client: openai.AsyncOpenAI, endpoint: Endpoint, items: Sequence[Item], ratios: Ratios
) -> list[Answer]:
    """Ask the questions of one conversation, each with those before it and their answers."""
    messages: list[Any] = []
    answers: list[Answer] = []
    for item in items:
        messages.append(_user_turn(item, with_image=not messages))
        answers.append(await _ask(client, endpoint, messages, ratios))
        if answers[-1].error:  # later questions have no history
            return answers + [answers[-1]] * (len(items) - len(answers))
        own = endpoint.history == HISTORIES[0]
        said = answers[-1].text if own else item.answers[0]
        messages.append({"role": "assistant", "content": said})
    return answers


async def _ask(
    client: openai.AsyncOpenAI, endpoint: Endpoint, messages: list[Any], ratios: Ratios
) -> Answer:
    began = time.perf_counter()
    text, ttft, usage = "", 0.0, None
    try:
        stream = await client.chat.completions.create(
            model=endpoint.model,
            messages=messages,
            temperature=0,
            max_tokens=endpoint.max_tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=endpoint.extra_body(ratios),
        )
        async for chunk in stream:
            for choice in chunk.choices:
                if choice.delta.content:
                    ttft = ttft or time.perf_counter() - began
                    text += choice.delta.content
            usage = chunk.usage or usage
    except openai.APIError as error:
        return Answer("", error=str(error))
    latency = time.perf_counter() - began
    return Answer(
        text=text.strip(),
        ttft=ttft or latency,
        latency=latency,
        prompt_tokens=usage.prompt_tokens if usage else 0,
        usage=(usage.model_extra or {}).get("himap") if usage else None,
    )
