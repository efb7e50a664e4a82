# SPDX-License-Identifier: Apache-2.0
"""Host arrays to the device, together, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from himap_vllm.layout import IntArray


def upload(arrays: Sequence[IntArray], device: torch.device) -> list[torch.Tensor]:
    """The arrays on `device`, int64, shapes kept: views of one tensor, filled by one copy.

    vLLM's `async_tensor_h2d` stages in pinned memory. A plain `.to(device)` from pageable memory
    would wait for everything queued on the device before it.
    """
    # Here, so that the arithmetic above this module can be tested without vLLM.
    from vllm.utils.torch_utils import async_tensor_h2d

    packed = np.concatenate([array.reshape(-1) for array in arrays])
    flat = async_tensor_h2d(packed, device=device)
    pieces = flat.split([array.size for array in arrays])
    return [piece.view(array.shape) for piece, array in zip(pieces, arrays, strict=True)]
