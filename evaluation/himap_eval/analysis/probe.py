# SPDX-License-Identifier: Apache-2.0
"""Hooks in a worker that measure, or block, the attention of one prompt at a time.

The engine runs its own layers, eagerly. Each attention layer hands query, key, value and its output
to a probe, which sums up attention and, where a flow is blocked, replaces rows of the output.

* `vllm.config.ParallelConfig.worker_extension_cls` (read): `himap analyze` names
  `ProbeExtension` there, whose methods `collective_rpc` calls by name. Remove when: vLLM lets a
  plugin add methods to workers.
* `vllm.v1.worker.worker_base.WorkerBase.get_model` (called): the loaded model, whatever the model
  runner. Remove when: vLLM lets a plugin change a model that it has loaded.
* `vllm.model_executor.models.interfaces_base.VllmModelForTextGeneration.compute_logits` (called):
  logits of all tokens of an answer in one pass, without those of its prompt. Remove when: vLLM
  returns log-probabilities of chosen positions of a prompt.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from himap_vllm.model.attention import AttentionCall, check_plain_softmax, wrap_forward
from himap_vllm.model.families import FAMILIES
from himap_vllm.model.install import attention_of

from .flows import DROPPED, IMAGE, IMAGE_TO_IMAGE, IMAGE_TO_TEXT, TEXT, blocked_rows, layer_flows

BLOCKS = {
    "image_to_text": IMAGE_TO_TEXT,
    "image_to_image": IMAGE_TO_IMAGE,
    "dropped": DROPPED,
}
_NUM_BEST = 5  # the paper compares the five best tokens


@dataclass
class Task:
    """What to do with the next prompt.

    Attributes:
        classes: [num_tokens] class of each token (`flows`), those of the answer included.
        answer: the answer's tokens. All but the last are the end of the prompt.
        measures: whether to sum up attention.
        block: a name in `BLOCKS`, or None.
        layers: first and last layer to block, the last not included.
    """

    classes: list[int]
    answer: list[int]
    measures: bool = False
    block: str | None = None
    layers: tuple[int, int] = (0, 0)


@dataclass
class Found:
    """What came of it.

    Attributes:
        layers: by layer, `LayerFlows` as lists.
        similarity: by layer, mean cosine of the residual stream before and behind it, of image
            tokens and of the instruction's.
        logprobs: [len(answer)] of the answer's tokens; empty on ranks that have no logits.
        same: [len(answer)] whether the token is the likeliest.
        best: the likeliest first tokens, best first.
    """

    layers: list[dict[str, Any]] = field(default_factory=list)
    similarity: list[tuple[float, float]] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    best: list[int] = field(default_factory=list)


class Probe:
    """Hooks on a loaded model. They do nothing while there is no task."""

    def __init__(self, model: Any, decoder: Any) -> None:
        self._model = model
        self._task: Task | None = None
        self._found = Found()
        self._classes = torch.empty(0)
        self._entering: torch.Tensor | None = None
        device = next(decoder.parameters()).device
        self._device = device
        for index, layer in enumerate(decoder.layers):
            attention = attention_of(layer)
            check_plain_softmax(attention)
            behind = functools.partial(self._behind_attention, index, attention.impl.scale)
            wrap_forward(attention.impl, after=behind)
            layer.register_forward_pre_hook(self._before_layer, with_kwargs=True)
            layer.register_forward_hook(self._behind_layer)
        # The norm, as a decoder's `__call__` may not run hooks.
        decoder.norm.register_forward_hook(self._behind_decoder)

    def start(self, task: Task) -> None:
        """Apply a task to the next prompt."""
        self._task, self._found = task, Found()
        self._classes = torch.tensor(task.classes, device=self._device)

    def take(self) -> Found:
        """Return what was found, and forget the task."""
        self._task = None
        return self._found

    def _runs(self, num_rows: int) -> Task | None:
        """The task, in the step that computes its whole prompt; rows behind it are padding."""
        task = self._task
        return task if task is not None and num_rows >= len(task.classes) else None

    def _behind_attention(self, index: int, scale: float, call: AttentionCall) -> None:
        task = self._runs(call.metadata.num_actual_tokens)
        if task is not None:
            size = len(task.classes)
            tensors = call.query[:size], call.key[:size], call.value[:size]
            self._attend(task, index, *tensors, scale, call.output)

    def _attend(
        self,
        task: Task,
        index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        output: torch.Tensor,
    ) -> None:
        if task.measures:
            size = _prompt_length(task)
            flows = layer_flows(query[:size], key[:size], scale, self._classes[:size])
            self._found.layers.append(
                {name: getattr(flows, name).tolist() for name in flows.__slots__}
            )
        if task.block is not None and task.layers[0] <= index < task.layers[1]:
            rows, own = blocked_rows(query, key, value, scale, self._classes, BLOCKS[task.block])
            output.view(len(output), *query.shape[1:])[rows] = own.to(output.dtype)

    def _before_layer(self, _layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("positions", "hidden_states", "residual"), args, strict=False)) | kwargs
        task = self._runs(len(given["hidden_states"]))
        if task is not None and task.measures:
            # At once: the layer adds to its inputs in place.
            self._entering = _stream(given["hidden_states"], given.get("residual"))

    def _behind_layer(self, _layer: Any, _args: Any, output: Any) -> None:
        if self._entering is None or self._task is None:
            return
        size = _prompt_length(self._task)
        leaving = _stream(*output)
        cosine = torch.cosine_similarity(self._entering[:size], leaving[:size], dim=-1)
        classes = self._classes[:size]
        means = [float(cosine[classes == own].mean()) for own in (IMAGE, TEXT)]
        self._found.similarity.append((means[0], means[1]))
        self._entering = None

    def _behind_decoder(self, _norm: Any, _args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        task = self._runs(len(hidden))
        if task is None:
            return
        end = len(task.classes)
        logits = self._model.compute_logits(hidden[end - len(task.answer) : end])
        if logits is None:
            return
        logprobs = logits.float().log_softmax(-1)
        answer = torch.tensor(task.answer, device=logprobs.device)
        self._found.logprobs = logprobs.gather(1, answer[:, None])[:, 0].tolist()
        self._found.same = (logprobs.argmax(-1) == answer).tolist()
        self._found.best = logprobs[0].topk(_NUM_BEST).indices.tolist()


def _prompt_length(task: Task) -> int:
    return len(task.classes) - len(task.answer) + 1


def _stream(hidden_states: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    stream = hidden_states.float()
    return stream if residual is None else stream + residual


def attach(worker: Any) -> int:
    """Put a probe into a worker's model; returns the number of its layers.

    Raises:
        ValueError: the model is of no known family, or its attention is not a plain softmax.
    """
    model = worker.get_model()
    decoder: Any = FAMILIES[worker.model_config.architecture].decoder(model)
    worker.himap_probe = Probe(model, decoder)
    return len(decoder.layers)


def start(worker: Any, task: dict[str, Any]) -> None:
    """Apply a task, `Task` as a dict, to the next prompt."""
    worker.himap_probe.start(Task(**task))


def take(worker: Any) -> dict[str, Any]:
    """What came of it, `Found` as a dict."""
    return asdict(worker.himap_probe.take())


class ProbeExtension:
    """The functions above as methods of a worker."""

    def himap_probe_attach(self) -> int:
        """As `attach`."""
        return attach(self)

    def himap_probe_start(self, task: dict[str, Any]) -> None:
        """As `start`."""
        start(self, task)

    def himap_probe_take(self) -> dict[str, Any]:
        """As `take`."""
        return take(self)
