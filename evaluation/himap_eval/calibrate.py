# SPDX-License-Identifier: Apache-2.0
"""`himap calibrate`: how much attention an image token gets for its place alone.

The criterion `debiased` divides attention by this positional prior. It is the mean over questions
about many images: images without meaning by default, better a sample of what users ask.

* `vllm.sampling_params.SamplingParams.skip_reading_prefix_cache` (read): set, because attention is
  known of prompts that are computed only. Remove when: a prompt can ask to be computed in full.
"""

from __future__ import annotations

import base64
import gc
import io
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from himap_vllm.plan.prior import FILE_NAME, PositionPrior, PriorError, describe_model, resampled

from .errors import CommandError
from .formats import read
from .items import Item, check_images, held_out, sample
from .offline import messages_of, start_engine
from .options import add_files, engine_parser, guarded, layer_pair, natural, parse, positive

_QUESTIONS = (
    "Describe the image.",
    "What is in the image?",
    "What do you see?",
    "Is there anything unusual?",
    "What is this?",
    "How many objects are there?",
)
_BATCH = 16
# The first cut drops nothing, so that all tokens of an image come to the second.
_RATIOS = {"himap_shallow_ratio": 0.0, "himap_deep_ratio": 0.5}
_VOTERS = "stratified"  # text rows vote at both cuts, as for `debiased`

FloatArray = npt.NDArray[np.float64]


def main(argv: list[str]) -> int:
    """Command line; returns the exit status."""
    parser = engine_parser(
        "calibrate",
        "vLLM's engine",
        "Measure the positional prior that the criterion `debiased` needs.",
    )
    parser.add_argument(
        "--layers", type=layer_pair, action="append", metavar="K1,K2",
        help="cuts; repeatable (default: the engine's)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path(FILE_NAME),
        help=f"file; layers that it has already stay (default: {FILE_NAME})",
    )  # fmt: skip
    group = parser.add_argument_group("data (default: noise and plain colours)")
    add_files(group)
    group.add_argument("--limit", type=positive, default=200, help="images (default: 200)")
    group.add_argument(
        "--first-scene", type=natural, metavar="N",
        help="scenes of the project's own held-out set from number N on, instead",
    )  # fmt: skip
    group.add_argument(
        "--image-size", type=positive, default=448, metavar="PIXELS",
        help="side of an image without meaning (default: 448)",
    )  # fmt: skip
    args = parse(parser, argv)
    return guarded("calibrate", _run, args)


def _run(args: Namespace) -> int:
    items = _items(args)
    prior: PositionPrior | None = None
    if args.output.exists():
        try:
            prior = PositionPrior.read(args.output)
        except PriorError as error:
            raise CommandError(f"--output {args.output}: {error}") from error
    for layers in args.layers or [None]:
        found = _measure(args, layers, items)
        if prior is not None and prior.model != found.model:
            raise CommandError(f"--output {args.output} is of another model; name another file")
        prior = PositionPrior(found.model, {**(prior.layers if prior else {}), **found.layers})
        prior.write(args.output)
        print(f"layers {sorted(found.layers)}, {len(items)} questions: {args.output}")
    return 0


def _items(args: Namespace) -> list[Item]:
    if args.data is not None:
        items = sample(read(args.format, args.data, args.images), args.limit)
        check_images(items)
        return items
    if args.first_scene is not None:
        return held_out(args.limit, args.first_scene)[0][::2]
    return list(_without_meaning(args.limit, args.image_size))


def _without_meaning(count: int, size: int) -> Iterator[Item]:
    """Noise and plain colours in turn, always the same."""
    draws = np.random.default_rng(0)
    for index in range(count):
        shape = (size, size, 3) if index % 2 else (1, 1, 3)
        pixels = draws.integers(0, 256, shape, dtype=np.uint8)
        image = Image.fromarray(np.broadcast_to(pixels, (size, size, 3)).copy())
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        question = _QUESTIONS[index // 2 % len(_QUESTIONS)]
        yield Item(url, question, ("",), "none", str(index))


def _measure(
    args: Namespace, layers: tuple[int, int] | None, items: Sequence[Item]
) -> PositionPrior:
    """Start an engine with these cuts, ask all questions, and average."""
    from vllm import SamplingParams

    llm, cuts = _engine(args, layers)
    params = SamplingParams(
        max_tokens=1,
        temperature=0,
        extra_args=dict(_RATIOS),
        skip_reading_prefix_cache=True,
    )
    shares: dict[int, list[FloatArray]] = {cut: [] for cut in cuts}
    for begin in range(0, len(items), _BATCH):
        prompts = [messages_of(item) for item in items[begin : begin + _BATCH]]
        for output in llm.chat(prompts, params, use_tqdm=False):
            found = llm.collective_rpc("himap_attention", args=(output.request_id,))[0]
            if found is None:
                raise CommandError("a prompt was not pruned: too long, or without image tokens")
            for cut, images in zip(cuts, (found["shallow"], found["deep"]), strict=True):
                shares[cut] += [np.array(own) / np.mean(own) for own in images]
    model = describe_model(llm.llm_engine.model_config.hf_text_config)
    del llm
    gc.collect()  # ends the engine: the next may need its memory
    return PositionPrior(model, {cut: mean_of(own) for cut, own in shares.items()})


def mean_of(shares: Sequence[FloatArray]) -> npt.NDArray[np.float32]:
    """The mean of several images' attention, at the size that most of them have."""
    ((size, _),) = Counter(map(len, shares)).most_common(1)
    mean = np.mean([resampled(own, size) for own in shares], axis=0)
    return np.asarray(mean / mean.mean(), dtype=np.float32)


def _engine(args: Namespace, layers: tuple[int, int] | None) -> tuple[Any, tuple[int, int]]:
    """An engine, and its cuts."""
    from himap_vllm.config import engine_settings

    himap: dict[str, Any] = {"criterion": _VOTERS, "trace_requests": _BATCH}
    if layers is not None:
        himap.update(zip(("shallow_layer", "deep_layer"), layers, strict=True))
    llm = start_engine(args.model, args.flags, himap)
    settings = engine_settings(llm.llm_engine.vllm_config.additional_config)
    assert settings is not None
    return llm, (settings.shallow_layer, settings.deep_layer)
