# SPDX-License-Identifier: Apache-2.0
"""The tokens that open a turn of the assistant, from the model's chat template.

A question is rendered with the prompt of an answer behind it, and as an earlier turn with its
answer. What both have in common behind the question opens every turn. The prompt of an answer alone
would not do: a template may begin a thought in it which it leaves out of earlier turns.

Seams:

* `vllm.v1.engine.input_processor.InputProcessor.renderer` (read): it has the tokenizer, and renders
  a chat as for a request. Remove when: vLLM tells admission where the turns of a prompt begin.
* `vllm.renderers.base.BaseRenderer.render_messages`, `vllm.renderers.params.ChatParams` (called):
  likewise, with the model's own template. Remove when: vLLM tells admission where the turns of a
  prompt begin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

from vllm.logger import init_logger
from vllm.renderers.params import ChatParams

from himap_vllm.config import EngineSettings

logger = init_logger("vllm.himap")

_QUESTIONS = ("What is it", "How many, 7", "Which one?", "Tell me.", "Look (there)")
"""Ends of a message that differ: a token that has a part of one is no part of the marker."""

_ANSWERS = ("Yes", "no.", "7", "(It is)")
"""Likewise, beginnings of an answer."""

Render = Callable[[str, str | None], Sequence[int]]
"""(the question, the answer; None: the prompt of one) -> token ids."""


def turn_marker(input_processor: Any, settings: EngineSettings) -> tuple[int, ...]:
    """The token ids that open each turn of the assistant in a prompt; empty: not known.

    Args:
        input_processor: vLLM's.
        settings: of the engine.
    """
    renderer = input_processor.renderer
    tokenizer = renderer.tokenizer
    given = settings.turn_marker
    if isinstance(given, tuple):
        return given
    if tokenizer is None:
        return ()
    if given is not None:
        return tuple(tokenizer.encode(given, add_special_tokens=False))
    try:
        marker = common_opening(lambda *texts: _rendered(renderer, *texts))
        text = tokenizer.decode(list(marker))
    except Exception as error:  # a template may raise anything
        logger.info("HiMAP: the chat template can't be read for the turns of a chat: %s", error)
        return ()
    # A few signs would be found in the middle of a turn.
    if not any(sign.isalpha() for sign in text):
        logger.info("HiMAP: no marker of the assistant's turns in the chat template: %r", text)
        return ()
    logger.info("HiMAP: a turn of the assistant begins with %r", text)
    return marker


def common_opening(render: Render) -> tuple[int, ...]:
    """What is between every question and every answer."""
    openings = []
    for question in _QUESTIONS:
        chats = [render(question, answer) for answer in (None, *_ANSWERS)]
        openings.append(_common_prefix(chats))
    return tuple(reversed(_common_prefix([opening[::-1] for opening in openings])))


def _common_prefix(sequences: Sequence[Sequence[int]]) -> list[int]:
    columns = zip(*sequences, strict=False)
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]


def _rendered(renderer: Any, question: str, answer: str | None) -> Sequence[int]:
    messages = [{"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
        # Templates show thoughts in the last answer, and not in earlier ones.
        messages.append({"role": "user", "content": question})
    params = ChatParams(chat_template_kwargs={"add_generation_prompt": answer is None})
    _, prompt = renderer.render_messages(messages, params)
    if "prompt_token_ids" in prompt:
        return list(prompt["prompt_token_ids"])
    return list(renderer.tokenizer.encode(prompt["prompt"], add_special_tokens=False))
