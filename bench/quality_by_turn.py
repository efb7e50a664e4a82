# SPDX-License-Identifier: Apache-2.0
"""What pruning leaves for a second question: `python -m bench.quality_by_turn`.

The bundled model is asked about one object of a picture, and then, in the same conversation, about
another one. Each setting has the second question in three forms:

* `alone`: as the only question, so its own text votes;
* `turn`: after the first question and its right answer, with `votes` set to `turn`. What is kept
  was chosen by the first question, and comes from the prefix cache;
* `all`: the same conversation with `votes` set to `all`: both questions choose.

Only those pairs count whose second question it answers right without pruning, alone and in the
conversation. The report has the share of them that stays right, and how many there were.
"""

from __future__ import annotations

import argparse
import gc
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from himap_demo.heldout import FIRST_SEED
from himap_demo.questions import Question, ask
from himap_demo.scenes import draw, make_scene
from himap_eval.client import UNPRUNED
from himap_eval.offline import start_engine
from himap_eval.options import natural, positive, ratio_pair
from himap_eval.scoring import exact
from himap_eval.stats import Retention, retention
from himap_eval.tables import interval, markdown_table, percent, to_json
from PIL.Image import Image
from pydantic import TypeAdapter

from bench.tables import environment, progress, report, versions
from himap_vllm.config import EngineSettings
from himap_vllm.criteria import CRITERIA
from himap_vllm.plan.prompt import Ratios

ONE_OBJECT = dict.fromkeys(("color", "shape", "where", "number", "word"), 1.0)
"""Kinds of questions that are about one object."""

ALONE, TURN, ALL = FORMS = ("alone", "turn", "all")
RATIOS = (Ratios(0.25, 0.5), Ratios(0.5, 0.75))
FIRST_SCENE = 40_000  # no setting was chosen on these, and no prior comes from them
BATCH = 50  # conversations that the KV cache holds at once
# On a CPU without bfloat16 arithmetic float32 is four times as fast.
FLAGS = ["--enforce-eager", "--kv-cache-memory-bytes", "512M", "--dtype", "float32"]


@dataclass(frozen=True)
class Pair:
    """Two questions about different objects of one picture."""

    image: Image
    first: Question
    second: Question


@dataclass(frozen=True)
class Cell:
    """One form of the second questions at one setting.

    Attributes:
        criterion: name of the criterion; None if unpruned.
        ratios: both 0 if unpruned.
        form: one of `FORMS`.
        scores: 1 or 0 for each pair.
        reused: pairs of which the prefix cache had the whole picture.
    """

    criterion: str | None
    ratios: Ratios
    form: str
    scores: list[float]
    reused: int


@dataclass(frozen=True)
class Scores:
    """Everything measured; the first two cells are unpruned, `alone` and `turn`."""

    first_scene: int
    num_pairs: int
    cells: list[Cell]


def pairs(first_scene: int) -> Iterator[Pair]:
    """One pair for each held-out scene from number `first_scene` on that has one; without end."""
    seed = FIRST_SEED + first_scene
    while True:
        scene = make_scene(seed)
        questions = ask(random.Random(seed), scene, 8, ONE_OBJECT)
        others = [question for question in questions if question.thing != questions[0].thing]
        if others:
            yield Pair(draw(scene), questions[0], others[0])
        seed += 1


def messages(pair: Pair, form: str) -> list[dict[str, Any]]:
    """The second question in a form."""
    image = {"type": "image_pil", "image_pil": pair.image}
    alone, first, second = (
        {"type": "text", "text": question.text}
        for question in (pair.second, pair.first, pair.second)
    )
    if form == ALONE:
        return [{"role": "user", "content": [image, alone]}]
    return [
        {"role": "user", "content": [image, first]},
        {"role": "assistant", "content": pair.first.answers[0]},
        {"role": "user", "content": [second]},
    ]


def measure(llm: Any, criterion: str | None, ratios: Ratios, form: str, asked: list[Pair]) -> Cell:
    """Ask the second questions. In the form `turn` the first ones come before."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=16,
        extra_args={
            "himap_shallow_ratio": ratios.shallow,
            "himap_deep_ratio": ratios.deep,
            "himap_votes": ALL if form == ALL else TURN,
        },
    )
    image_tokens = llm.llm_engine.model_config.hf_config.image_seq_length
    cell = Cell(criterion, ratios, form, [], 0)
    for begin in range(0, len(asked), BATCH):
        part = asked[begin : begin + BATCH]
        conversations = [messages(pair, form) for pair in part]
        if form == TURN:
            llm.chat([own[:1] for own in conversations], params, use_tqdm=False)
        outputs = llm.chat(conversations, params, use_tqdm=False)
        cell.scores.extend(
            exact(output.outputs[0].text, pair.second.answers)
            for output, pair in zip(outputs, part, strict=True)
        )
        reused = sum((output.num_cached_tokens or 0) > image_tokens for output in outputs)
        cell = replace(cell, reused=cell.reused + reused)
    progress(f"{criterion} {ratios} {form}: {sum(cell.scores):.0f} of {len(asked)} right")
    return cell


def engine(criterion: str) -> Any:
    """The bundled model with its own cuts, and prefix caching on."""
    from himap_server.bundled import bundled_model

    himap = {**bundled_model().engine, "criterion": criterion}
    return start_engine(None, FLAGS, himap, enable_prefix_caching=True)


def usable(unpruned: Sequence[Cell]) -> list[int]:
    """Numbers of the pairs that every unpruned form has right."""
    rows = zip(*(cell.scores for cell in unpruned), strict=True)
    return [index for index, row in enumerate(rows) if all(row)]


def run(args: argparse.Namespace, scores: Scores) -> None:
    """Add the cells that are missing, and write them after each engine."""
    cells = scores.cells
    drawn = list(islice(pairs(args.first_scene), args.num_pairs))
    done = {(cell.criterion, cell.ratios, cell.form) for cell in cells}
    for criterion in args.criteria:
        forms = FORMS if EngineSettings(criterion=criterion).needs_text else FORMS[:2]
        wanted = [(ratios, form) for ratios in args.ratios for form in forms]
        missing = [own for own in wanted if (criterion, *own) not in done]
        if not missing:
            continue
        llm = engine(criterion)
        if not cells:
            cells += [measure(llm, None, UNPRUNED, form, drawn) for form in (ALONE, TURN)]
        counted = [drawn[index] for index in usable(cells[:2])]
        cells += [measure(llm, criterion, *own, counted) for own in missing]
        args.scores.write_text(to_json(asdict(scores)))
        del llm
        gc.collect()  # ends the engine: the next may need its memory


def share(cell: Cell | None, base: Cell | None = None) -> Retention | None:
    """Right answers of `cell` over those of `base`; over all pairs without `base`."""
    if cell is None:
        return None
    own = cell.scores
    every = [1.0] * len(own)
    return retention(own, base.scores if base else every, [str(i) for i in range(len(own))])


def tables(cells: Sequence[Cell]) -> dict[str, str]:
    """A section for each pair of ratios."""
    head = ["criterion", "alone", "`turn`", "`all`", "`turn` over `all`", "found in the cache"]
    sections = {}
    for ratios in dict.fromkeys(cell.ratios for cell in cells[2:]):
        found = {(cell.criterion, cell.form): cell for cell in cells if cell.ratios == ratios}
        rows = []
        for name in dict.fromkeys(criterion for criterion, _ in found):
            alone, turn, every = (found.get((name, form)) for form in FORMS)
            shares = [share(alone), share(turn), share(every)]
            shares.append(share(turn, every) if every else None)
            reused = percent(turn.reused / len(turn.scores), 0) if turn else "-"
            rows.append([str(name), *(interval(s) if s else "-" for s in shares), reused])
        sections[f"Ratios {ratios}"] = markdown_table(head, rows)
    return sections


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality_by_turn",
        description="What the bundled model, pruned, knows of a picture at a second question.",
    )
    parser.add_argument(
        "--criteria", nargs="+", default=[*CRITERIA, EngineSettings().criterion], metavar="NAME",
        type=lambda text: EngineSettings.parse({"criterion": text}).criterion,
        help="A+B: A at the first cut, B at the second (default: all, and the engine's default)",
    )  # fmt: skip
    parser.add_argument(
        "--ratios", type=ratio_pair, nargs="+", default=list(RATIOS), metavar="SHALLOW,DEEP",
        help=f"default: {', '.join(map(str, RATIOS))}",
    )  # fmt: skip
    parser.add_argument("--num-pairs", type=positive, default=500, help="default: 500")
    parser.add_argument("--first-scene", type=natural, default=FIRST_SCENE, metavar="N")
    parser.add_argument(
        "--scores", type=Path, default=Path("quality-by-turn.json"),
        help="file; what it has already is not measured again",
    )  # fmt: skip
    args = parser.parse_args()
    scores = Scores(args.first_scene, args.num_pairs, [])
    if args.scores.exists():
        found = TypeAdapter(Scores).validate_json(args.scores.read_bytes())
        if replace(found, cells=[]) != scores:
            parser.error(f"{args.scores} has other pairs; name another file with --scores")
        scores = found
    run(args, scores)
    cells = scores.cells
    alone, turn = (share(cell) for cell in cells[:2])
    assert alone is not None
    assert turn is not None
    text = (
        f"Unpruned: {interval(alone)} of {len(cells[0].scores)} second questions right alone, "
        f"{interval(turn)} in the conversation; {len(usable(cells[:2]))} right both times. "
        f"{versions(environment())}."
    )
    print(report({"Second questions": text, **tables(cells)}))


if __name__ == "__main__":
    main()
