# SPDX-License-Identifier: Apache-2.0
"""The models that are measured: LLaVA-1.5 in shape, random in weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.checkpoints import build_llava

HEAD_DIM = 64
PATCH_SIZE = 14  # pixels
IMAGE_SIZE = 336  # pixels, as LLaVA-1.5 has it
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Model:
    """Shape of a decoder; the vision tower is small, so that the decoder dominates.

    Speed does not depend on what the weights are, only on how many, and neither do KV blocks.
    """

    num_layers: int
    num_heads: int
    intermediate_size: int

    @property
    def hidden_size(self) -> int:
        return self.num_heads * HEAD_DIM

    @property
    def image_tokens(self) -> int:
        return (IMAGE_SIZE // PATCH_SIZE) ** 2

    @property
    def decoder_parameters(self) -> int:
        """Weights of the decoder layers' matrices."""
        per_layer = 4 * self.hidden_size**2 + 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * per_layer

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Keys and values of one token in all layers, unpruned."""
        return 2 * self.num_layers * self.hidden_size * DTYPE_BYTES[dtype]

    def checkpoint(self, folder: Path) -> Path:
        """The model's directory under `folder`; written if it is not there."""
        name = f"llava-{self.num_layers}x{self.hidden_size}-{self.intermediate_size}"
        path = folder / name
        done = path / ".complete"
        if not done.exists():
            build_llava(
                path,
                num_layers=self.num_layers,
                num_heads=self.num_heads,
                num_kv_heads=self.num_heads,
                hidden_size=self.hidden_size,
                intermediate_size=self.intermediate_size,
                image_size=IMAGE_SIZE,
                patch_size=PATCH_SIZE,
            )
            done.touch()
        return path

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready description."""
        return {
            **asdict(self),
            "hidden_size": self.hidden_size,
            "image_tokens": self.image_tokens,
            "decoder_parameters": self.decoder_parameters,
        }


FULL = Model(num_layers=32, num_heads=14, intermediate_size=2432)  # 312 M parameters
# Block counts follow from the numbers of layers and tokens; the width only costs time.
THIN = Model(num_layers=32, num_heads=1, intermediate_size=64)
QUICK = Model(num_layers=12, num_heads=2, intermediate_size=256)
