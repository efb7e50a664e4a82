# SPDX-License-Identifier: Apache-2.0
"""The positional prior: how much attention a token gets for its place alone.

`himap calibrate` measures it and writes it to a file; the criterion `debiased` divides by it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FORMAT = "himap-position-prior"
VERSION = 1
FILE_NAME = "himap_prior.json"
"""Where an engine looks for it in the model's folder."""

_LEAST = 0.01  # of the mean; a place that got no attention by chance must not win for ever

FloatArray = npt.NDArray[np.float32]


class PriorError(ValueError):
    """A file that holds no usable prior."""


@dataclass(frozen=True, slots=True)
class PositionPrior:
    """Mean attention by place in an image.

    Attributes:
        model: what the decoder must look like, see `describe_model`.
        layers: by the number of layers before the cut: [num_places] relative attention, mean 1, of
            places that divide an image's raster evenly.
    """

    model: dict[str, Any]
    layers: dict[int, FloatArray]

    def at(self, layer: int, num_tokens: int) -> FloatArray:
        """[num_tokens] the prior of each token of an image, in raster order.

        An image of another size than the measured ones gets values by linear interpolation along
        the raster.
        """
        values = resampled(self.layers[layer], num_tokens)
        return np.maximum(values, _LEAST).astype(np.float32)

    def check(self, model: Mapping[str, Any], layers: tuple[int, ...]) -> None:
        """Raise PriorError unless the prior is of this model and of these layers."""
        if self.model != dict(model):
            raise PriorError(f"it was measured on another model: {self.model}, this is {model}")
        missing = [layer for layer in layers if layer not in self.layers]
        if missing:
            raise PriorError(
                f"it has layers {sorted(self.layers)}, the cuts follow {missing}; measure them "
                "with `himap calibrate`"
            )

    def write(self, path: Path) -> None:
        """Write the file."""
        layers = {
            str(layer): [round(float(value), 4) for value in self.layers[layer]]
            for layer in sorted(self.layers)
        }
        raw = {"format": FORMAT, "version": VERSION, "model": self.model, "layers": layers}
        path.write_text(json.dumps(raw) + "\n")

    @classmethod
    def read(cls, path: Path) -> PositionPrior:
        """Read a file.

        Raises:
            PriorError: it can't be read, or is not such a file.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if (raw["format"], raw["version"]) != (FORMAT, VERSION):
                raise PriorError(f"not version {VERSION} of {FORMAT}")
            layers = {
                int(layer): np.array(values, dtype=np.float32)
                for layer, values in raw["layers"].items()
            }
            model = dict(raw["model"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PriorError(f"it can't be read: {error}") from error
        for values in layers.values():
            if (
                values.ndim != 1
                or not len(values)
                or not (np.isfinite(values) & (values >= 0)).all()
            ):
                raise PriorError("it has a layer without values, or with values below 0")
        return cls(model, layers)


def resampled(values: npt.ArrayLike, size: int) -> npt.NDArray[np.float64]:
    """[size] `values` [num_places] of evenly spaced places, read between them on straight lines."""
    known = np.asarray(values, dtype=np.float64)
    places = (np.arange(size) + 0.5) / size * len(known) - 0.5
    return np.interp(places, np.arange(len(known)), known)


def describe_model(hf_text_config: Any) -> dict[str, Any]:
    """Numbers of a decoder's configuration that tell one model from another.

    Checkpoints of one architecture and size, fine-tuned differently, look the same.
    """
    names = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    return {name: getattr(hf_text_config, name, None) for name in names}
