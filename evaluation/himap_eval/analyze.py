# SPDX-License-Identifier: Apache-2.0
"""`himap analyze`: where a model reads its images, and where to cut.

The paper's analysis, run on the engine's own layers, one question at a time.
"""

from __future__ import annotations

import gc
import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from himap_vllm.plan.cuts import default_cuts
from himap_vllm.plan.prompt import Ratios

from .analysis.cuts import all_cuts, recommended
from .analysis.findings import by_place, effect_means, layer_means, layer_weights, shift_layer
from .analysis.measure import Observation, Observer
from .analysis.probe import BLOCKS
from .analysis.report import Analysis, write
from .errors import CommandError
from .formats import read
from .items import Item, check_images, held_out, sample
from .offline import messages_of, start_engine
from .options import add_files, engine_parser, guarded, natural, parse, positive, ratio_pair

_MULTIPROCESSING = "VLLM_ENABLE_V1_MULTIPROCESSING"
_EXTENSION = "himap_eval.analysis.probe.ProbeExtension"


def main(argv: list[str]) -> int:
    """Command line; returns the exit status."""
    parser = engine_parser(
        "analyze",
        "vLLM's engine",
        "Measure where a model reads its images, and recommend K1 and K2.",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("himap-analysis"),
        help="folder (default: himap-analysis)",
    )  # fmt: skip
    parser.add_argument(
        "--ratios", type=ratio_pair, default=Ratios(0.5, 0.75), metavar="R1,R2",
        help="that cuts are recommended for (default: 0.5,0.75)",
    )  # fmt: skip
    parser.add_argument(
        "--answer-tokens", type=positive, default=8, help="longest answer (default: 8)"
    )
    parser.add_argument(
        "--check", action="store_true",
        help="then measure the recommended cuts and the default ones with himap sweep",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    group = parser.add_argument_group("data (default: the project's own held-out set)")
    add_files(group)
    group.add_argument("--limit", type=positive, default=50, help="questions (default: 50)")
    group.add_argument(
        "--first-scene", type=natural, default=0, metavar="N",
        help="first scene of the held-out set (default: 0)",
    )  # fmt: skip
    args = parse(parser, argv)
    return guarded("analyze", _run, args)


def _run(args: Namespace) -> int:
    if args.data is None:
        items = held_out(args.limit, args.first_scene)[0][::2]
    else:
        items = sample(read(args.format, args.data, args.images), args.limit)
    check_images(items)
    with _engine_core_here():
        analysis = _analyze(args, items)
    print(f"{write(args.output, analysis)}\nin {args.output}/")
    return _check(args, analysis) if args.check else 0


@contextmanager
def _engine_core_here() -> Iterator[None]:
    """Keep the engine core in this process: every pass is a call to it, and there are thousands.

    * `vllm.envs.VLLM_ENABLE_V1_MULTIPROCESSING` (read): set to 0 for that. Remove when: `LLM` has
      an argument for it.
    """
    before = os.environ.get(_MULTIPROCESSING)
    os.environ[_MULTIPROCESSING] = "0"
    try:
        yield
    finally:
        del os.environ[_MULTIPROCESSING]
        if before is not None:
            os.environ[_MULTIPROCESSING] = before


def _analyze(args: Namespace, items: Sequence[Item]) -> Analysis:
    from himap_vllm.model.families import FAMILIES

    llm = start_engine(
        args.model, args.flags, worker_extension_cls=_EXTENSION, enforce_eager=True,
        enable_prefix_caching=False, max_num_seqs=1,
    )  # fmt: skip
    config = llm.llm_engine.model_config
    family = FAMILIES.get(config.architecture)
    if family is None or llm.llm_engine.vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise CommandError(
            f"himap analyze supports the architectures {', '.join(FAMILIES)}, without pipeline "
            f"parallelism; got {config.architecture}"
        )
    first_cut = family.first_cut(config.hf_config)
    try:
        observer = Observer(llm, args.answer_tokens)
    except ValueError as error:  # attention that the probe does not know
        raise CommandError(str(error)) from error
    check_depth(observer.num_layers, first_cut)
    seen = _observe(llm, observer, items, args.quiet)
    del llm
    gc.collect()  # ends the engine: --check may need its memory
    effects = effect_means(seen, observer.windows)
    cuts = all_cuts(seen, layer_weights(effects), args.ratios, first_cut)
    default = default_cuts(observer.num_layers, first_cut)
    return Analysis(
        about={
            "model": args.model or "the bundled model",
            "data": _data_name(args),
            "num_questions": len(items),
            "flags": args.flags,
        },
        layers=layer_means(seen),
        effects=effects,
        from_text=by_place(seen, "from_text"),
        from_image=by_place(seen, "from_image"),
        shift_layer=shift_layer(effects),
        ratios=args.ratios,
        recommended=recommended(cuts, observer.num_layers),
        default=next(one for one in cuts if (one.shallow_layer, one.deep_layer) == default),
        cuts=cuts,
    )


def check_depth(num_layers: int, first_cut: int) -> None:
    """Raise CommandError unless a decoder has room for two cuts.

    Args:
        num_layers: of the decoder.
        first_cut: least K1 of the model.
    """
    if first_cut > num_layers - 2:
        raise CommandError(
            f"the decoder has {num_layers} layers, which leaves no room for two cuts: the first "
            f"may not be before layer {first_cut}"
        )


def _data_name(args: Namespace) -> str:
    if args.data is not None:
        return f"{args.data.name} ({args.format})"
    return f"the project's held-out set, from scene {args.first_scene} on"


def _observe(llm: Any, observer: Observer, items: Sequence[Item], quiet: bool) -> list[Observation]:
    """Ask all questions.

    * `vllm.entrypoints.common.offline.OfflineInferenceMixin._preprocess_chat` (called): a
      conversation as the engine takes it, images processed and placeholders expanded. Remove when:
      `LLM` has a public method for that.
    """
    passes = 2 + len(BLOCKS) * len(observer.windows)
    seen = []
    with tqdm(total=len(items) * passes, unit="pass", disable=quiet) as progress:
        for item in items:
            (prompt,) = llm._preprocess_chat([messages_of(item)])
            seen.append(observer.observe(prompt, lambda: progress.update()))
    return seen


def _check(args: Namespace, analysis: Analysis) -> int:
    """Measure retention at the recommended and at the default cuts."""
    from .sweep import main as sweep

    pairs = {
        f"{cuts.shallow_layer},{cuts.deep_layer}": None
        for cuts in (analysis.recommended, analysis.default)
    }
    argv = [
        *([] if args.model is None else [args.model]),
        *(part for pair in pairs for part in ("--layers", pair)),
        *("--ratios", f"{args.ratios.shallow},{args.ratios.deep}"),
        *("--output", str(args.output / "check"), "--limit", str(args.limit), "--no-plot"),
    ]
    if args.data is None:
        argv += ["--first-scene", str(args.first_scene), "--num-scenes", str(args.limit)]
    else:
        argv += ["--data", str(args.data), "--format", args.format]
        argv += [] if args.images is None else ["--images", str(args.images)]
    argv += ["--quiet"] if args.quiet else []
    return sweep([*argv, *(["--", *args.flags] if args.flags else [])])
