# SPDX-License-Identifier: Apache-2.0
"""One question: the model's answer, its attention, and what blocking flows does to the answer.

The paper (Fig. 5) blocks a flow in the first or in the last five layers. Here each window of layers
is blocked in turn, in a forward pass of its own over the prompt and the unblocked answer.

* `vllm.v1.engine.llm_engine.LLMEngine.add_request`, `vllm.v1.engine.llm_engine.LLMEngine.step`
  (called): run a prompt whose images are processed already, again and again, with more tokens
  behind it. Remove when: `LLM.generate` takes such prompts.
* `vllm.multimodal.inputs.PlaceholderRange.extract_embeds_range`,
  `vllm.multimodal.inputs.PlaceholderRange.get_num_embeds` (called): which of a placeholder's tokens
  are an image's. Remove when: the positions of image tokens are part of vLLM's public API.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CommandError
from .flows import IMAGE, MARK, SYSTEM, TEXT
from .probe import BLOCKS, Found, Task

FloatArray = npt.NDArray[np.float64]

_UNPRUNED = {"himap_shallow_ratio": 0.0, "himap_deep_ratio": 0.0}
_MOST_WINDOWS = 16
_runs = itertools.count()


@dataclass(frozen=True, slots=True)
class Effect:
    """What blocking did to an answer.

    Attributes:
        loss: log-probability of the answer, in nats: unblocked minus blocked.
        same: whether each of its tokens is still the likeliest (the paper's label consistency).
        overlap: of the five likeliest first tokens, intersection over union (score consistency).
    """

    loss: float
    same: bool
    overlap: float


@dataclass(frozen=True, slots=True)
class Observation:
    """What was found for one question.

    Attributes:
        counts: [4] tokens of each class.
        image_sizes: image tokens of each image.
        answer: the unblocked answer's tokens.
        logprob: of that answer.
        mass: [num_layers, 4, 4], as `LayerFlows.mass`.
        from_text: [num_layers, num_image_tokens], as `LayerFlows.from_text`.
        from_image: [num_layers, num_image_tokens], as `LayerFlows.from_image`.
        entropy: [num_layers, 4], as `LayerFlows.entropy`.
        similarity: [num_layers, 2], as `Found.similarity`.
        effects: by name of `BLOCKS`, of each window. That of "dropped" is from the window's first
            layer to the end.
    """

    counts: FloatArray
    image_sizes: tuple[int, ...]
    answer: tuple[int, ...]
    logprob: float
    mass: FloatArray
    from_text: FloatArray
    from_image: FloatArray
    entropy: FloatArray
    similarity: FloatArray
    effects: dict[str, list[Effect]]


def windows_of(num_layers: int, most: int = _MOST_WINDOWS) -> list[tuple[int, int]]:
    """Windows of layers, of one length but for the last: first layer, and the one behind."""
    size = -(-num_layers // most)
    return [(begin, min(begin + size, num_layers)) for begin in range(0, num_layers, size)]


def classes_of(num_tokens: int, images: Sequence[Any]) -> list[int]:
    """Class of each token of a prompt.

    Args:
        num_tokens: of the prompt.
        images: vLLM's `PlaceholderRange` of each image, in prompt order.
    """
    runs = [list(image.extract_embeds_range()) for image in images]
    first = runs[0][0][0]
    classes = [SYSTEM if place < first else TEXT for place in range(num_tokens)]
    for own in runs:
        begin, end = own[0][0], own[-1][1] + 1
        classes[begin:end] = [MARK] * (end - begin)
        for start, last in own:
            classes[start : last + 1] = [IMAGE] * (last + 1 - start)
    return classes


class Observer:
    """Runs prompts in an engine whose workers have a probe (`ProbeExtension`)."""

    def __init__(self, llm: Any, answer_tokens: int) -> None:
        """
        Args:
            llm: vLLM's `LLM`.
            answer_tokens: longest answer.
        """
        self._llm = llm
        self._answer_tokens = answer_tokens
        self.num_layers = int(llm.collective_rpc("himap_probe_attach")[0])
        self.windows = windows_of(self.num_layers)

    def observe(self, prompt: Any, on_pass: Callable[[], object] = lambda: None) -> Observation:
        """Run all passes of a prompt.

        Args:
            prompt: vLLM's `EngineInput`: images processed, placeholders expanded.
            on_pass: called behind each.

        Raises:
            CommandError: there is no image, or the prompt does not fit in one step.
        """
        ids = list(prompt["prompt_token_ids"])
        images = sorted(
            prompt.get("mm_placeholders", {}).get("image", ()), key=lambda image: image.offset
        )
        if not images:
            raise CommandError("a prompt has no image")
        answer = self._run(prompt, ids, self._answer_tokens)
        on_pass()
        classes = classes_of(len(ids), images) + [TEXT] * (len(answer) - 1)
        whole = ids + answer[:-1]

        def run(**what: Any) -> list[Found]:
            task = Task(classes, answer, **what)
            self._llm.collective_rpc("himap_probe_start", args=(asdict(task),))
            self._run(prompt, whole, 1)
            on_pass()
            return [Found(**one) for one in self._llm.collective_rpc("himap_probe_take")]

        ranks = run(measures=True)
        base = _with_logits(ranks)
        effects = {
            name: [
                _effect(base, _with_logits(run(block=name, layers=(begin, stop))))
                for begin, end in self.windows
                for stop in [self.num_layers if name == "dropped" else end]
            ]
            for name in BLOCKS
        }
        counts = np.bincount(classes[: len(ids)], minlength=4)
        sizes = tuple(image.get_num_embeds() for image in images)
        return Observation(
            counts=counts.astype(np.float64),
            image_sizes=sizes,
            answer=tuple(answer),
            logprob=sum(base.logprobs),
            similarity=np.array(base.similarity),
            effects=effects,
            **{
                name: _mean_of_ranks(ranks, name)
                for name in ("mass", "from_text", "from_image", "entropy")
            },
        )

    def _run(self, prompt: Any, ids: list[int], max_tokens: int) -> list[int]:
        """Generate greedily; returns the tokens."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_tokens, extra_args=dict(_UNPRUNED))
        name = f"himap-analyze-{next(_runs)}"
        engine = self._llm.llm_engine
        # No pass may find the keys of another in the prefix cache.
        own = {**prompt, "prompt_token_ids": ids, "cache_salt": name}
        own.pop("prompt", None)
        engine.add_request(name, own, params)
        tokens: list[int] = []
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    tokens = list(output.outputs[0].token_ids)
        return tokens


def _with_logits(ranks: Sequence[Found]) -> Found:
    for found in ranks:
        if found.logprobs:
            return found
    raise CommandError(
        "a prompt was not computed in one step; name a larger --max-num-batched-tokens behind --"
    )


def _mean_of_ranks(ranks: Sequence[Found], name: str) -> FloatArray:
    """[num_layers, ...]; heads are spread over the ranks evenly, and every number is a mean."""
    values = [[layer[name] for layer in found.layers] for found in ranks]
    return np.asarray(np.mean(values, axis=0), dtype=np.float64)


def _effect(base: Found, blocked: Found) -> Effect:
    before, after = set(base.best), set(blocked.best)
    return Effect(
        loss=sum(base.logprobs) - sum(blocked.logprobs),
        same=all(blocked.same),
        overlap=len(before & after) / len(before | after),
    )
