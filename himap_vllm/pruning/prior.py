# SPDX-License-Identifier: Apache-2.0
"""The positional prior on the device.

* `vllm.utils.torch_utils.async_tensor_h2d` (called): the values of a new image size are copied
  without a wait for the device. Remove when: torch stages copies from pageable memory itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from himap_vllm.config import EngineSettings
from himap_vllm.plan.prior import FloatArray, PositionPrior

_NUM_SIZES = 256  # image sizes of which the values stay on the device


class PriorTable:
    """A positional prior for images of any size, at both cuts.

    Values of an image size are computed when the first image of that size comes.
    """

    def __init__(self, prior: PositionPrior, layers: tuple[int, int]) -> None:
        """
        Args:
            prior: of the model.
            layers: the cuts. A cut whose layer the prior does not have gets ones.
        """
        self._prior = prior
        self._layers = layers
        self._of_size: OrderedDict[int, torch.Tensor] = OrderedDict()

    @classmethod
    def load(cls, settings: EngineSettings) -> PriorTable | None:
        """Read the engine's file; None if its criteria need none."""
        if not settings.prior_layers:
            return None
        assert settings.position_prior is not None, "set by the API process"
        prior = PositionPrior.read(Path(settings.position_prior))
        return cls(prior, (settings.shallow_layer, settings.deep_layer))

    def of(self, num_tokens: Sequence[int], device: torch.device) -> torch.Tensor:
        """The prior of each token of some images, one after the other.

        Args:
            num_tokens: [num_images] of each image.
            device: of the result.

        Returns:
            [2, sum of num_tokens] float32, for the first and for the second cut.
        """
        return torch.cat([self._of_image(count, device) for count in num_tokens], dim=1)

    def _of_image(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        if num_tokens in self._of_size:
            self._of_size.move_to_end(num_tokens)
        else:
            values = np.stack([self._at(layer, num_tokens) for layer in self._layers])
            self._of_size[num_tokens] = async_tensor_h2d(values, device=device)
            if len(self._of_size) > _NUM_SIZES:
                self._of_size.popitem(last=False)
        return self._of_size[num_tokens]

    def _at(self, layer: int, num_tokens: int) -> FloatArray:
        if layer not in self._prior.layers:
            return np.ones(num_tokens, dtype=np.float32)
        return self._prior.at(layer, num_tokens)
