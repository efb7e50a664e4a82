# SPDX-License-Identifier: Apache-2.0
"""`"himap": {"trace": true}`: asks the engine what a request's cuts kept, and says where that lies.

Nothing is done for requests that do not ask.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, Field
from vllm.v1.engine.exceptions import EngineDeadError

from himap_vllm.config import TRACE_ARG
from himap_vllm.frontend.merged_stats import take_trace

from ..errors import GatewayError, Reason
from ..offload import off_the_loop
from ..record import RequestRecord
from .families import LayoutFinder
from .grids import Grid, GridKind, ImageLayout, unknown

_SECONDS = 5.0  # the engine answers between two steps


class TraceBox(BaseModel):
    """Where a grid lies in the picture that was sent, in its pixels, upright.

    The cell in row r and column c begins at (left + c * cell_width, top + r * cell_height). A cell
    may reach beyond the picture, where the model's processor pads it.
    """

    left: float
    top: float
    cell_width: float
    cell_height: float


class TraceGrid(BaseModel):
    """Image tokens that form a grid, row by row.

    `kept_shallow` and `kept_deep` are run lengths: cells dropped, then cells kept, then dropped,
    and so on. They are null if the engine did not tell in time, or no longer had them. Scores are
    of each cell, null for one that did not come to the cut.
    """

    kind: GridKind
    rows: int
    columns: int
    box: TraceBox | None = Field(description="null: not known for this model")
    kept_shallow: list[int] | None
    kept_deep: list[int] | None
    scores_shallow: list[float | None] | None = None
    scores_deep: list[float | None] | None = None


class ImageTrace(BaseModel):
    """What the cuts kept of an image.

    `width` and `height` are of the picture that was sent, upright; null if `box` is. `other_tokens`
    are in no grid, such as line breaks: all of them, and those kept by each cut.
    """

    width: int | None
    height: int | None
    grids: list[TraceGrid]
    other_tokens: list[int | None]


@dataclass(slots=True)
class AskedTrace:
    """The trace that a request asks for.

    Attributes:
        name: under which the engine keeps it.
        scores: whether scores are wanted.
        images: of each image, once the engine has told; None: not yet.
    """

    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    scores: bool = False
    images: list[dict[str, Any]] | None = None


class Tracer:
    """Traces of a served model's requests."""

    def __init__(self, engine: Any, finder: LayoutFinder, allowed: bool) -> None:
        self._engine = engine
        self._finder = finder
        self._allowed = allowed

    def ask(self, body: Any, record: RequestRecord) -> None:
        """Tell the engine of a request that asks for its trace, if it does.

        Raises:
            GatewayError: HTTP 400.
        """
        if TRACE_ARG in (getattr(body, "vllm_xargs", None) or {}):
            raise _refusal(f"vllm_xargs.{TRACE_ARG}", "is not for clients: use himap.trace")
        wanted = body.himap.trace if body.himap is not None else False
        if not wanted:
            return
        if not self._allowed:
            raise _refusal("himap.trace", "must be false: this server gives no traces")
        options = getattr(body, "stream_options", None)
        in_chunks = body.stream and hasattr(body, "stream_options")
        if in_chunks and not getattr(options, "include_usage", False):
            text = "must be true for himap.trace, which comes with the usage"
            raise _refusal("stream_options.include_usage", text)
        record.trace = AskedTrace(scores=wanted == "scores")
        body.vllm_xargs = {**(body.vllm_xargs or {}), TRACE_ARG: record.trace.name}

    async def collect(self, record: RequestRecord) -> None:
        """Write the trace of a request that asked for it into its record, once it has run."""
        asked = record.trace
        # Several prompts with images have one name.
        if asked is None or asked.images is not None or len(record.savings) != 1:
            return
        found: dict[str, Any] = {}
        if record.pruned:
            with contextlib.suppress(TimeoutError, EngineDeadError):
                async with asyncio.timeout(_SECONDS):
                    found = await take_trace(self._engine, asked.name, asked.scores) or {}
        asked.images = await off_the_loop(self._images, record, asked, found)

    def _images(
        self, record: RequestRecord, asked: AskedTrace, found: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """The trace of each image, in JSON's types."""
        numbers = range(len(record.savings[0].images))
        return [self._image(record, asked, index, found) for index in numbers]

    def _image(
        self, record: RequestRecord, asked: AskedTrace, index: int, found: dict[str, Any]
    ) -> dict[str, Any]:
        image = record.savings[0].images[index]
        number = image.image_tokens
        picture = record.picture(index)
        layout = unknown(number)
        if picture is not None:
            size = picture.width // picture.factor, picture.height // picture.factor
            layout = self._finder.find(size, number).scaled(picture.factor)
        kept: list[Sequence[int] | None] = (
            [range(number)] * 2 if image.kept_deep == number else [None] * 2
        )
        scores: list[list[float | None] | None] = [None, None]
        for cut in range(2 if found else 0):
            if found["kept"][cut][index] is not None:
                kept[cut] = found["kept"][cut][index]
                scores[cut] = found["scores"][cut][index] if asked.scores else None
        trace = _trace(layout, kept, scores)
        if picture is not None and layout.grids[0].box is not None:
            trace.width, trace.height = picture.width, picture.height
        without = set() if asked.scores else {"scores_shallow", "scores_deep"}
        return trace.model_dump(exclude={"grids": {"__all__": without}})


def _trace(
    layout: ImageLayout,
    kept: Sequence[Sequence[int] | None],
    scores: Sequence[Sequence[float | None] | None],
) -> ImageTrace:
    masks = [None if own is None else _mask(layout.num_tokens, own) for own in kept]
    others = set(range(layout.num_tokens))
    grids = []
    for grid in layout.grids:
        tokens = [token for row in grid.row_tokens() for token in row]
        others.difference_update(tokens)
        shallow, deep = (None if mask is None else _runs(mask, tokens) for mask in masks)
        of_shallow, of_deep = (
            None if own is None else [own[token] for token in tokens] for own in scores
        )
        grids.append(
            TraceGrid(
                kind=grid.kind,
                rows=grid.rows,
                columns=grid.columns,
                box=_box(grid),
                kept_shallow=shallow,
                kept_deep=deep,
                scores_shallow=of_shallow,
                scores_deep=of_deep,
            )
        )
    left = [None if mask is None else sum(mask[token] for token in others) for mask in masks]
    return ImageTrace(width=None, height=None, grids=grids, other_tokens=[len(others), *left])


def _box(grid: Grid) -> TraceBox | None:
    if grid.box is None:
        return None
    names = ("left", "top", "cell_width", "cell_height")
    return TraceBox(**{name: round(getattr(grid.box, name), 3) for name in names})


def _mask(number: int, kept: Sequence[int]) -> list[bool]:
    mask = [False] * number
    for token in kept:
        mask[token] = True
    return mask


def _runs(mask: Sequence[bool], tokens: Sequence[int]) -> list[int]:
    """Lengths of runs, the first of dropped tokens."""
    runs = [(kept, sum(1 for _ in run)) for kept, run in itertools.groupby(mask[t] for t in tokens)]
    lengths = [length for _, length in runs]
    return [0, *lengths] if runs and runs[0][0] else lengths


def _refusal(field_name: str, text: str) -> GatewayError:
    return GatewayError(400, f"{field_name} {text}", reason=Reason.INVALID, param=field_name)
