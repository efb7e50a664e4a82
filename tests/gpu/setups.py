# SPDX-License-Identifier: Apache-2.0
"""What is asked of engines on a GPU: `tests.gpu.answers` asks it, `tests.gpu.compare` judges it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.checkpoints import sample_images
from tests.engine import test_criteria, test_families, test_oracle
from tests.engines import WARM, Case
from tests.families import TINY

PICTURES = tuple(sample_images(8))
QUESTION = "USER: <image>\nWhat is this? ASSISTANT:"
SYSTEM = "Many words come before the picture, and they say little of it. " * 4
CRITERIA = (
    "uniform+half",
    "random",
    "uniform",
    "diversity",
    "mixed",
    "fastv",
    "stratified+debiased",
)
LIMIT = 192  # tokens of a step, less than a conversation


@dataclass(frozen=True)
class Setup:
    """One engine, and the batches that it is asked, one after the other.

    Attributes:
        shape: of `tests.world.World`.
        himap: settings; None: stock vLLM.
        batches: requests that are handed in at once.
        compiled: vLLM's default: compilation and CUDA graphs.
        options: of the engine.
    """

    name: str
    shape: str
    himap: dict[str, Any] | None
    batches: Sequence[Sequence[Case]]
    compiled: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def criterion(self) -> str:
        """What the cuts go by."""
        criterion: str = (self.himap or {}).get("criterion", "himap")
        return criterion


def unpruned() -> list[Case]:
    """Prompts of which nothing is dropped, and text."""
    pairs: list[Any] = [(0.0, 0.0), None]
    cases = [
        Case(prompt, PICTURES[start : start + count], pairs[0], max_tokens=24)
        for start, (prompt, count) in enumerate(test_oracle.PROMPTS.values())
    ]
    return [*cases, Case("No picture here. Go on:", (), pairs[1], max_tokens=24)]


def conversation() -> list[list[Case]]:
    """Turn by turn, resent, asked otherwise, and several answers at once; from the cache."""
    turns = (
        f"{SYSTEM}{QUESTION} A shape.</s>USER: And <image> that? ASSISTANT: Red.</s>USER: Is it? "
    )
    parts = [len(SYSTEM + QUESTION), turns.index("that? ASSISTANT:") + len("that? ASSISTANT:")]
    texts = [turns[: parts[0]], turns[: parts[1]], turns, turns[: parts[1]]]
    texts.append(turns[: parts[0]].replace("What is", "What of"))
    asked = [
        Case(text, PICTURES[: text.count("<image>")], (0.5, 0.75), params=WARM) for text in texts
    ]
    return [*([case] for case in asked), [asked[0]] * 4]


def families() -> list[Setup]:
    """Every family of the table, and stock vLLM on its unpruned prompts."""
    made = []
    for name, tiny in TINY.items():
        cases = test_families.cases(tiny.image)
        plain = [case for case in cases if case.ratios == (0.0, 0.0)]
        made.append(Setup(name, name, {}, [cases, plain]))
        made.append(Setup(f"{name}, stock", name, None, [plain]))
    return made


def setups() -> list[Setup]:
    """All of it; those that compile first, as they take longest."""
    many, few = {"kv_grouping": "many"}, {"kv_grouping": "few"}
    mixed, plain = test_oracle.CASES, unpruned()
    qwen3_vl = test_families.cases(TINY["qwen3-vl"].image)
    long_turns = [
        Case(f"{number} words. " * 9 + test_oracle.TURNS, PICTURES[number : number + 3], ratios)
        for number, ratios in enumerate(((0.5, 0.75), (0.9, 0.5), ((0.0, 0.5, 0.5), 0.75)))
    ]
    limited = {"max_num_batched_tokens": LIMIT}
    return [
        Setup("graphs", "mha12", {}, [mixed, plain, *conversation()], compiled=True),
        Setup("graphs, stock", "mha12", None, [plain], compiled=True),
        Setup("graphs, many", "gqa12", many, [mixed, *conversation()], compiled=True),
        Setup("qwen3-vl, graphs", "qwen3-vl", {}, [qwen3_vl], compiled=True),
        Setup("eager", "mha12", {}, [mixed, plain, *conversation()]),
        Setup("eager, stock", "mha12", None, [plain]),
        Setup("many", "gqa12", many, [mixed, *conversation()]),
        Setup("few", "mha32", few, [mixed, *conversation()]),
        Setup("small steps", "mha12", {}, [long_turns], options=limited),
        *(Setup(name, "mha12", {"criterion": name}, [test_criteria.CASES]) for name in CRITERIA),
        *families(),
    ]
