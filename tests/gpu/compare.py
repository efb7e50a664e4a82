# SPDX-License-Identifier: Apache-2.0
"""Holds a GPU's answers to the oracle and to stock vLLM: `python -m tests.gpu.compare FOLDER`.

The oracle computes in float32, the GPU in float16. An answer that differs is a tie if the oracle's
own choice there, of a token or of what is kept, hangs on less than such rounding; what follows from
it is not compared. Prints a table; 1 if an answer is wrong, or if more than a sixth are ties.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from bench.tables import table
from tests.engines import Case
from tests.gpu.setups import Setup, setups
from tests.oracle import OracleResult
from tests.world import World

SCORES_APART = 4e-3  # the least of score_margin; scores are shares of attention, summed over voters
TOKENS_APART = 0.1  # of two log-probabilities
LOGPROBS_ALIKE = 0.06
STOCK = ", stock"


def judge(case: Case, answer: dict[str, Any], expected: OracleResult) -> str:
    """`equal`, `tie`, or what is wrong."""
    if answer["prompt"] != expected.prompt_token_ids:
        return "prompt"
    wrong = _kept(case, answer, expected)
    if wrong:
        return "tie" if expected.score_margin < SCORES_APART else wrong
    best = expected.all_logprobs.topk(2, dim=-1).values
    gaps = (best[:, 0] - best[:, 1]).tolist()
    steps = zip(answer["tokens"], expected.tokens, gaps, strict=True)
    for step, (own, wanted, gap) in enumerate(steps):
        if own != wanted:
            return "tie" if gap < TOKENS_APART else "tokens"
        if abs(answer["logprobs"][step] - expected.logprobs[step]) > LOGPROBS_ALIKE:
            return "log-probabilities"
    return "equal"


def _kept(case: Case, answer: dict[str, Any], expected: OracleResult) -> str:
    """What is wrong with what the cuts kept of images that were not in the cache, or nothing."""
    cuts = ("shallow", expected.kept_shallow), ("deep", expected.kept_deep)
    if not case.images or case.ratios in (None, (0.0, 0.0)):
        return ""
    found = [places[-1] < answer["cached"] for places in expected.kept_shallow]
    if answer["trace"] is None:
        return "" if all(found) else "no trace"
    for cut, wanted in cuts:
        pairs = zip(answer["trace"][cut], wanted, found, strict=True)
        if any(own != places and not cached for own, places, cached in pairs):
            return f"kept, {cut}"
    return ""


def against_oracle(world: World, setup: Setup, found: dict[str, Any]) -> Counter[str]:
    """Verdicts of all answers of a setup."""
    verdicts: Counter[str] = Counter()
    for batch, answers in zip(setup.batches, found["batches"], strict=True):
        for index, (case, answer) in enumerate(zip(batch, answers, strict=True)):
            verdict = judge(case, answer, world.oracle(setup.shape, case, setup.criterion))
            verdicts[verdict] += 1
            if verdict not in ("equal", "tie"):
                print(f"{setup.name}, {index}: {verdict}: {case.ratios} {case.prompt!r}")
    return verdicts


def against_stock(ours: dict[str, Any], stock: dict[str, Any]) -> str:
    """Unpruned answers: how many have stock's tokens."""
    (theirs,) = stock["batches"]
    own = next(batch for batch in ours["batches"][1:] if len(batch) == len(theirs))
    same = sum(a["tokens"] == b["tokens"] for a, b in zip(own, theirs, strict=True))
    apart = max(
        abs(x - y)
        for a, b in zip(own, theirs, strict=True)
        if a["tokens"] == b["tokens"]
        for x, y in zip(a["logprobs"], b["logprobs"], strict=True)
    )
    return f"{same} of {len(own)}, {apart:.4f} apart"


def main() -> int:
    """Compare all that was answered."""
    parser = argparse.ArgumentParser("tests.gpu.compare", description=__doc__)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    lines = (args.folder / "answers.jsonl").read_text().splitlines()
    answered = {found["setup"]: found for found in map(json.loads, lines)}
    rows, bad = [], False
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for setup in setups():
            found = answered.get(setup.name, {"error": "no answer"})
            if "error" in found:
                rows.append([setup.name, found["error"].splitlines()[0][:80], "", "", ""])
                bad = True
                continue
            verdicts = against_oracle(world, setup, found)
            ties, equal = verdicts.pop("tie", 0), verdicts.pop("equal", 0)
            bad |= bool(verdicts) or 6 * ties > equal + ties
            stock = answered.get(setup.name + STOCK)
            beside = against_stock(found, stock) if stock and "batches" in stock else ""
            wrong = ", ".join(f"{count} {what}" for what, count in verdicts.items()) or "0"
            rows.append([setup.name, str(equal), str(ties), wrong, beside])
    print(table(["engine", "equal to the oracle", "ties", "wrong", "tokens as stock's"], rows))
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
