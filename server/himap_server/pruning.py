# SPDX-License-Identifier: Apache-2.0
"""The pruning of a request: what it asks for, within what its API key allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from himap_vllm.config import (
    DEEP_ARG,
    IF_POSSIBLE_ARG,
    SHALLOW_ARG,
    EngineSettings,
    HiMAPError,
    check_ratio,
)

from .errors import GatewayError, Reason
from .record import Detail
from .security.keys import Key, RatioRange

_FIELDS = {SHALLOW_ARG: "shallow_ratio", DEEP_ARG: "deep_ratio"}
"""Names of a ratio: for the engine, and in settings and keys."""


class PruningPolicy:
    """Writes the ratios of a request to where the engine reads them."""

    def __init__(self, settings: EngineSettings, low_detail: tuple[float, float]) -> None:
        """`low_detail` has the ratios of an image with `"detail": "low"`."""
        self._defaults = {arg: getattr(settings, field) for arg, field in _FIELDS.items()}
        self._maxima = {arg: getattr(settings, f"max_{field}") for arg, field in _FIELDS.items()}
        self._low = {
            arg: _within(ratio, (0, 1 if self._maxima[arg] is None else self._maxima[arg]))
            for arg, ratio in zip(_FIELDS, low_detail, strict=True)
        }

    def apply(self, request: Any, key: Key | None, details: Sequence[Detail]) -> None:
        """Turn `himap` and the details of images into `vllm_xargs`.

        The prefix caches of API keys are kept apart.

        Args:
            request: the body.
            key: the API key.
            details: of each image, in the order of the prompt.

        Raises:
            GatewayError: 403 if the key does not allow a ratio; 400 for a beam search that prunes:
                the tokens of a beam would vote, because vLLM runs each step as a new request.
        """
        args = dict(request.vllm_xargs or {})
        enabled = True
        if request.himap is not None:
            enabled = request.himap.enabled
            args.update(request.himap.as_xargs())
        asked = any(args.get(arg) for arg in _FIELDS)
        if key is not None:
            self._bound(args, key)
            # Otherwise the speed of an answer would tell one key what another's requests left in
            # the prefix cache (vLLM RFC #16016).
            request.cache_salt = f"{key.name}:{request.cache_salt or ''}"
        if enabled and any(detail != "auto" for detail in details):
            self._apply_details(args, key, details, asked)
        prunes = details and any(
            any(ratio) if isinstance(ratio, list) else ratio
            for ratio in (args.get(arg, default) for arg, default in self._defaults.items())
        )
        if prunes and getattr(request, "use_beam_search", False):
            raise GatewayError(
                400,
                "beam search can't be combined with pruning: himap.enabled must be false",
                reason=Reason.BEAM_SEARCH,
                param="use_beam_search",
            )
        request.vllm_xargs = args or None

    def _apply_details(
        self, args: dict[str, Any], key: Key | None, details: Sequence[Detail], asked: bool
    ) -> None:
        """Give each image ratios of its own. The request's, or the defaults, are for `auto`."""
        try:
            auto = {
                arg: check_ratio(arg, args.get(arg, default), self._maxima[arg])
                for arg, default in self._defaults.items()
            }
        except HiMAPError:
            return  # a list, which is of each image already; admission refuses anything else
        # A detail by itself is no reason to refuse a prompt that can't be pruned.
        args.setdefault(IF_POSSIBLE_ARG, not asked and not _demands_pruning(key))
        for arg in _FIELDS:
            bounds = _range_of(key, arg) or (0, 1)
            of_detail = {
                "auto": auto[arg],
                "low": _within(self._low[arg], bounds),
                "high": bounds[0],
                "original": bounds[0],
            }
            args[arg] = [of_detail[detail] for detail in details]

    def _bound(self, args: dict[str, Any], key: Key) -> None:
        if _demands_pruning(key):  # which is not the client's to soften
            args.pop(IF_POSSIBLE_ARG, None)
        for arg, field in _FIELDS.items():
            bounds = _range_of(key, arg)
            if bounds is None:
                continue
            default = self._defaults[arg]
            if arg not in args:
                if default != _within(default, bounds):
                    args[arg] = _within(default, bounds)
                continue
            for ratio in args[arg] if isinstance(args[arg], list) else [args[arg]]:
                # Admission refuses other types with a message.
                if isinstance(ratio, int | float) and not bounds[0] <= ratio <= bounds[1]:
                    raise GatewayError(
                        403,
                        f"{field} must be in [{bounds[0]:g}, {bounds[1]:g}] for this API key, "
                        f"got {ratio:g}",
                        reason=Reason.RATIO,
                        param=f"himap.{field}",
                    )


def _range_of(key: Key | None, arg: str) -> RatioRange | None:
    bounds: RatioRange | None = getattr(key, _FIELDS[arg], None)
    return bounds


def _demands_pruning(key: Key | None) -> bool:
    """Whether the key's requests must be pruned."""
    return any((_range_of(key, arg) or (0, 1))[0] > 0 for arg in _FIELDS)


def _within(ratio: float, bounds: tuple[float, float]) -> float:
    return min(max(ratio, bounds[0]), bounds[1])
