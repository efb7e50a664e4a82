# SPDX-License-Identifier: Apache-2.0
"""Copy host arrays to the device together, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from himap_vllm.plan.voters import IntArray

_ALIGNMENT = 2  # elements: 16 bytes, by whose multiples Triton specialises kernels


def upload(arrays: Sequence[IntArray], device: torch.device) -> list[torch.Tensor]:
    """Return the arrays on `device` as int64 with their shapes: views of one tensor, one copy.

    Each view is aligned as if it were alone. Otherwise Triton would compile kernels again for
    other alignments.

    * `vllm.utils.torch_utils.async_tensor_h2d` (called): it stages in pinned memory. A plain
      `.to(device)` from pageable memory would wait for everything queued on the device before it.
      Remove when: torch stages copies from pageable memory itself.
    """
    # Here, so that the arithmetic above this module can be tested without vLLM.
    from vllm.utils.torch_utils import async_tensor_h2d

    places = [-(-array.size // _ALIGNMENT) * _ALIGNMENT for array in arrays]
    packed = np.zeros(sum(places), dtype=np.int64)
    begin = 0
    for array, place in zip(arrays, places, strict=True):
        packed[begin : begin + array.size] = array.reshape(-1)
        begin += place
    pieces = async_tensor_h2d(packed, device=device).split(places)
    return [
        piece[: array.size].view(array.shape) for piece, array in zip(pieces, arrays, strict=True)
    ]
