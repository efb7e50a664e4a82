# SPDX-License-Identifier: Apache-2.0
"""The small bundled model, and the pictures and questions that it is made for.

`scenes` draws pictures, `questions` asks about them and knows the answers, and `heldout` has those
that training never sees. `training/` trains the model.
"""

from pathlib import Path

MODEL_PATH = Path(__file__).parent / "model"
"""The checkpoint, in the layout of the Hugging Face hub. `himap serve` serves it by default."""
