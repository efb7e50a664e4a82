# SPDX-License-Identifier: Apache-2.0
"""By how much an image may be scaled down before the model's processor scales it down further.

A phone's photo has 12 million pixels. A processor that makes 336 x 336 of every image needs less
than one million of them, and a JPEG can be decoded at 1/2, 1/4 or 1/8 of its size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_FACTORS = (8, 4, 2)  # a JPEG's own
# The processor's last step stays a reduction to a half or less, so that its filter decides.
_MARGIN = 2

# Processors that scale every image to one size, and those that scale it to a number of pixels.
# Others cut it into tiles, or choose a size by the image's own.
_FIXED = re.compile(r"(CLIP|Siglip|Llava)ImageProcessor(Fast|Pil)?")
_BY_PIXELS = re.compile(r"Qwen2VLImageProcessor(Fast|Pil)?")


@dataclass(frozen=True, slots=True)
class Reduction:
    """What a processor makes of a large image; None where that is not known.

    Attributes:
        side: least number of pixels that the shorter side must keep.
        pixels: the most pixels of the processor's own result.
    """

    side: int | None = None
    pixels: int | None = None

    def factor(self, width: int, height: int) -> int:
        """1, 2, 4 or 8. It divides both sides, so the processor computes the same size and tokens.

        It is 1 for an image that the processor would not scale to a half or less.
        """
        for factor in _FACTORS:
            if width % factor or height % factor:
                continue
            left = width // factor, height // factor
            if self.side is not None and min(left) >= _MARGIN * self.side:
                return factor
            if self.pixels is not None and left[0] * left[1] >= _MARGIN**2 * self.pixels:
                return factor
        return 1


def reduction_of(engine: Any) -> Reduction:
    """What the processor of a loaded engine allows.

    * `vllm.renderers.base.BaseRenderer.mm_processor` (read),
      `vllm.multimodal.processing.context.BaseProcessingInfo.get_hf_processor` (called): the
      processor with the operator's `--mm-processor-kwargs`. Remove when: vLLM decodes no more of an
      image than its processor uses.
    """
    processor = engine.renderer.mm_processor
    if processor is None:
        return Reduction()
    return reduction_for(getattr(processor.info.get_hf_processor(), "image_processor", None))


def reduction_for(processor: Any) -> Reduction:
    """The same of one of transformers' image processors; nothing for one that is not known."""
    name = type(processor).__name__
    size = getattr(processor, "size", None)
    if size is None or not getattr(processor, "do_resize", False):
        return Reduction()
    names = ("shortest_edge", "longest_edge", "height", "width")
    edges = {edge: _edge(size, edge) for edge in names}
    if _BY_PIXELS.fullmatch(name):
        return Reduction(pixels=edges["longest_edge"])
    if _FIXED.fullmatch(name) and edges["longest_edge"] is None:
        return Reduction(side=max((edge for edge in edges.values() if edge), default=None))
    return Reduction()


def _edge(size: Any, name: str) -> int | None:
    return size.get(name) if isinstance(size, dict) else getattr(size, name, None)
