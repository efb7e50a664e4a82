# SPDX-License-Identifier: Apache-2.0
"""The small bundled model: what its world looks like, what is asked about it, and where it lies.

`scenes` draws pictures, `questions` asks about them and knows the answers, `heldout` is the part of
that world that training never sees. `training/` makes the model of it.
"""

from pathlib import Path

MODEL_PATH = Path(__file__).parent / "model"
"""The checkpoint in the hub's layout: what `himap serve` serves when it is given no model."""
