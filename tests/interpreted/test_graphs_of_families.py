# SPDX-License-Identifier: Apache-2.0
"""Every family on Model Runner V2, compiled and with CUDA graphs as on a GPU."""

from __future__ import annotations

from dataclasses import replace

from tests.engine import test_families
from tests.families import NUM_LAYERS, TINY, every_family
from tests.interpreted.cuda_graphs import GraphPiece, Played
from tests.world import World


@every_family
def test_a_mixed_batch_equals_the_oracle(world: World, name: str) -> None:
    """Every other case: each ratio pair, each prompt, unpruned and text-only ones."""
    played = Played(world.engine(name, compiled=True))
    cases = test_families.cases(TINY[name].image)[::2]
    test_families.equal_oracle(world, played.engine, name, cases)
    assert played.pruning.total() > 0 < played.steps["FULL"]
    # One prompt has graphs for all of its prefill.
    for ratios in ((0.0, 0.0), (0.5, 0.75)):
        played.forget()
        replays = GraphPiece.replays
        test_families.equal_oracle(world, played.engine, name, [replace(cases[0], ratios=ratios)])
        assert played.pruning.total() == any(ratios)
        assert played.stages == {0: 1, 1: 1, 2: 1}
        assert GraphPiece.replays == replays + NUM_LAYERS + 3
