# SPDX-License-Identifier: Apache-2.0
"""Where the units of a prompt end: with the turn of the user in which their images are.

What survives of an image then depends on nothing that is said later, so that it stays the same in
all later turns of a conversation.
"""

from __future__ import annotations

from collections.abc import Sequence

from himap_vllm.plan.prompt import ImageTokens


def ends_of_turns(
    token_ids: Sequence[int], images: Sequence[ImageTokens], marker: Sequence[int]
) -> list[int]:
    """The end of each image's unit, if the text of its turn votes.

    Args:
        token_ids: the prompt.
        images: in prompt order.
        marker: what opens a turn of the assistant. Empty: the prompt is one turn.

    Returns:
        For each image, the end of the first marker behind it; without any, the prompt's end.
    """
    ends, begin, end = [], -1, -1  # of the marker that was found last
    for image in images:
        seen = _seen(image)
        if begin < seen:
            begin = _find(token_ids, marker, seen)
            end = min(begin + len(marker), len(token_ids))
        ends.append(end)
    return ends


def ends_of_images(images: Sequence[ImageTokens]) -> list[int]:
    """The end of each image's unit, if nothing behind it is read: each is a unit of its own."""
    return [_seen(image) for image in images]


def _seen(image: ImageTokens) -> int:
    """Tokens up to the end of an image; of one without tokens, which is in no unit, 0."""
    return image.last + 1 if image.count else 0


def _find(token_ids: Sequence[int], marker: Sequence[int], begin: int) -> int:
    """The first place of the marker, at least `begin`; the prompt's length if there is none."""
    size, marker = len(marker), list(marker)
    while size:
        try:
            begin = token_ids.index(marker[0], begin)
        except ValueError:
            break
        if list(token_ids[begin : begin + size]) == marker:
            return begin
        begin += 1
    return len(token_ids)
