# SPDX-License-Identifier: Apache-2.0
"""The position of the cuts in a decoder, and the layers of each stage. Arithmetic without vLLM."""

from __future__ import annotations


def default_cuts(num_layers: int, first_cut: int = 1) -> tuple[int, int]:
    """K1 and K2 of a decoder of `num_layers` layers: where the paper's 2 and 8 lie in 32.

    Args:
        num_layers: of the decoder.
        first_cut: least K1 of the model.
    """
    shallow = max(first_cut, round(num_layers / 16))
    return shallow, max(shallow + 1, round(num_layers / 4))


def stage_layers(shallow_layer: int, deep_layer: int, num_layers: int) -> tuple[int, int, int]:
    """Number of decoder layers of each stage.

    Args:
        shallow_layer: K1, layers before the first cut.
        deep_layer: K2, layers before the second cut.
        num_layers: of the decoder.
    """
    return shallow_layer, deep_layer - shallow_layer, num_layers - deep_layer
