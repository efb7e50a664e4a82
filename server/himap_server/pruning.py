# SPDX-License-Identifier: Apache-2.0
"""The pruning of a request: what it asks for, within what its API key allows."""

from __future__ import annotations

from typing import Any

from himap_vllm.config import DEEP_ARG, SHALLOW_ARG, EngineSettings

from .errors import GatewayError, Reason
from .security.keys import Key


class PruningPolicy:
    """Writes the ratios of a request to where the engine reads them."""

    def __init__(self, settings: EngineSettings) -> None:
        self._defaults = {SHALLOW_ARG: settings.shallow_ratio, DEEP_ARG: settings.deep_ratio}

    def apply(self, request: Any, key: Key | None, images: int) -> None:
        """Turn `himap` into `vllm_xargs`, and keep the prefix caches of API keys apart.

        Raises:
            GatewayError: 403 if the key does not allow a ratio; 400 for a beam search that prunes:
                the tokens of a beam would vote, because vLLM runs each step as a new request.
        """
        args = dict(request.vllm_xargs or {})
        if request.himap is not None:
            args.update(request.himap.as_xargs())
        if key is not None:
            self._bound(args, key)
            # Otherwise the speed of an answer would tell one key what another's requests left in
            # the prefix cache (vLLM RFC #16016).
            request.cache_salt = f"{key.name}:{request.cache_salt or ''}"
        prunes = images and any((self._defaults | args)[name] for name in self._defaults)
        if prunes and getattr(request, "use_beam_search", False):
            raise GatewayError(
                400,
                "beam search can't be combined with pruning: himap.enabled must be false",
                reason=Reason.BEAM_SEARCH,
                param="use_beam_search",
            )
        request.vllm_xargs = args or None

    def _bound(self, args: dict[str, Any], key: Key) -> None:
        for name, field, bounds in (
            (SHALLOW_ARG, "shallow_ratio", key.shallow_ratio),
            (DEEP_ARG, "deep_ratio", key.deep_ratio),
        ):
            if bounds is None:
                continue
            lowest, highest = bounds
            default = self._defaults[name]
            if name not in args:
                if not lowest <= default <= highest:
                    args[name] = min(max(default, lowest), highest)
            elif not isinstance(args[name], int | float):
                continue  # admission refuses it with a message
            elif not lowest <= args[name] <= highest:
                raise GatewayError(
                    403,
                    f"{field} must be in [{lowest:g}, {highest:g}] for this API key, "
                    f"got {args[name]:g}",
                    reason=Reason.RATIO,
                    param=f"himap.{field}",
                )
