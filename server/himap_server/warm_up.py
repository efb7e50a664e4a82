# SPDX-License-Identifier: Apache-2.0
"""The first requests of every engine, answered before the server says that it is ready.

A kernel that ends the engine's process, a model that can't compute what it was loaded for: they end
the start, not a client's request. Nothing of it shows in metrics, counters or logs of requests.

* `vllm.v1.engine.async_llm.AsyncLLM.logger_manager`,
  `vllm.v1.engine.async_llm.AsyncLLM._logger_ref`,
  `vllm.v1.engine.async_llm.AsyncLLM.log_requests` (read): set aside for the moment, because vLLM
  counts and logs every request of its engine client. Remove when: a request can ask not to be
  counted.
* `vllm.renderers.base.BaseRenderer.render_cmpl_async` (called): renders a prompt as vLLM's handlers
  do; `skip_mm_cache` keeps the picture out of the cache and its statistics. Remove when: the engine
  client renders prompts itself.
* `vllm.multimodal.processing.dummy_inputs.BaseDummyInputsBuilder.get_dummy_text` (called): a text
  with one picture in it, for every model, without its chat template. Remove when: vLLM warms up
  with a picture by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image
from vllm import SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.logger import init_logger
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from himap_vllm.frontend.merged_stats import reset_engine_stats

logger = init_logger("vllm.himap.server")

_IMAGE_SIDE = 64
_TEXT = " Hello"


class _RefusedError(Exception):
    """A prompt that never came to the engine."""


async def warm_up(engine: AsyncLLM) -> None:
    """Have every engine answer one token of text, and a picture where the model takes pictures.

    A prompt that the model's processor, or this server's limits, refuse is a warning: the engine
    itself is well.

    Raises:
        RuntimeError: the engine died or failed a request.
    """
    with _unrecorded(engine):
        for name, render in (("text", _render_text), ("picture", _render_picture)):
            try:
                prompt = await render(engine)
                if prompt is None:
                    continue
                await _answer(engine, prompt, name)
            except _RefusedError as error:
                logger.warning("warm-up without %s: %s", name, error)
            else:
                logger.info("warmed up with %s", name)
        await engine.reset_mm_cache()  # the engine's half has the picture, ours was skipped
        await reset_engine_stats(engine)


def _ranks(engine: AsyncLLM) -> range:
    parallel = engine.vllm_config.parallel_config
    local = parallel.local_engines_only
    return range(parallel.data_parallel_size_local if local else parallel.data_parallel_size)


@contextmanager
def _unrecorded(engine: AsyncLLM) -> Iterator[None]:
    log_requests, manager = engine.log_requests, engine.logger_manager
    engine.log_requests = False
    _record_with(engine, None)
    try:
        yield
    finally:
        engine.log_requests = log_requests
        _record_with(engine, manager)


def _record_with(engine: AsyncLLM, manager: Any) -> None:
    engine.logger_manager = manager
    if engine.output_handler is not None:  # it has a reference of its own since it was started
        engine._logger_ref[0] = manager


def _token(engine: AsyncLLM) -> int:
    tokenizer = engine.renderer.get_tokenizer()
    return int((tokenizer.encode(_TEXT, add_special_tokens=False) or [0])[-1])


async def _render_text(engine: AsyncLLM) -> Any:
    """vLLM's input for one token."""
    (rendered,) = await engine.renderer.render_cmpl_async([{"prompt_token_ids": [_token(engine)]}])
    return rendered


async def _render_picture(engine: AsyncLLM) -> Any:
    """vLLM's input for a blank picture; None where the model takes none."""
    try:
        processor = engine.renderer.get_mm_processor()
        if not processor.info.allowed_mm_limits.get("image"):
            return None
        prompt = {
            "prompt": processor.dummy_inputs.get_dummy_text({"image": 1}) + _TEXT,
            "multi_modal_data": {"image": [Image.new("RGB", (_IMAGE_SIDE, _IMAGE_SIDE))]},
        }
        (rendered,) = await engine.renderer.render_cmpl_async([prompt], skip_mm_cache=True)
    except Exception as error:  # whatever a model's own code raises
        raise _RefusedError(f"{type(error).__name__}: {error}") from error
    return rendered


async def _answer(engine: AsyncLLM, prompt: Any, name: str) -> None:
    params = SamplingParams(
        temperature=0, max_tokens=2, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
    )
    failure = f"the engine failed the warm-up request ({name})"
    for rank in _ranks(engine):
        outputs = engine.generate(prompt, params, f"warm-up-{name}", data_parallel_rank=rank)
        try:
            reasons = [output.outputs[0].finish_reason async for output in outputs]
        except VLLMClientError as error:  # too long for this server's limits, for instance
            raise _RefusedError(str(error)) from error
        except Exception as error:
            raise RuntimeError(failure) from error
        if reasons != ["length"]:
            raise RuntimeError(f"{failure}: {reasons}")
