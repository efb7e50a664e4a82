# SPDX-License-Identifier: Apache-2.0
"""Settings of the engine (`additional_config["himap"]`) and of a request (`extra_args`).

Both are checked here, without vLLM: a bad value must become a clear error at start-up or for the
one request, so that it cannot crash the engine core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from himap_vllm.plan.cuts import KVGrouping, default_cuts
from himap_vllm.plan.prompt import Ratios

CriterionName = Literal[
    "himap",
    "fastv",
    "random",
    "uniform",
    "diversity",
    "mixed",
    "stratified",
    "debiased",
    "text",
    "half",
]
"""What survivors may be chosen by; `himap_vllm.criteria` has them, and torch."""

READS_PRIOR: tuple[CriterionName, ...] = ("debiased",)
"""Criteria that need a file of `himap calibrate`."""

NEEDS_NO_TEXT: tuple[CriterionName, ...] = ("random", "uniform", "diversity")
"""Criteria that read nothing behind an image."""

Votes = Literal["turn", "all"]
"""Which text votes for an image: that of its turn, or all text behind it."""

ADDITIONAL_CONFIG_KEY = "himap"
SHALLOW_ARG = "himap_shallow_ratio"
DEEP_ARG = "himap_deep_ratio"
VOTES_ARG = "himap_votes"
IF_POSSIBLE_ARG = "himap_if_possible"
TRACE_ARG = "himap_trace"
_ARGS = (SHALLOW_ARG, DEEP_ARG, VOTES_ARG, IF_POSSIBLE_ARG, TRACE_ARG)
_MAX_TRACE_NAME = 64
_ARG_PREFIX = "himap"


class HiMAPError(ValueError):
    """A setting that cannot be honoured; `parameter` names it."""

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(message)
        self.parameter = parameter


def check_ratio(parameter: str, value: Any, maximum: float | None = None) -> float:
    """Return `value` as a ratio in [0, 1), or in [0, maximum].

    Raises:
        HiMAPError: `value` is not a number (a boolean is not one), is NaN, or is out of range.
    """
    allowed = "[0, 1)" if maximum is None else f"[0, {maximum}]"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise HiMAPError(
            parameter, f"{parameter} must be a number in {allowed}, got {type(value).__name__}"
        )
    # NaN compares false with everything.
    if not 0 <= value < 1 or (maximum is not None and value > maximum):
        raise HiMAPError(parameter, f"{parameter} must be in {allowed}, got {value}")
    return float(value)


def _check_int(parameter: str, value: Any, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise HiMAPError(parameter, f"{parameter} must be an integer >= {minimum}, got {value!r}")
    return value


def _check_name(parameter: str, value: Any, names: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in names:
        raise HiMAPError(parameter, f"{parameter} must be one of {', '.join(names)}, got {value!r}")


def _parse_marker(value: Any) -> str | tuple[int, ...] | None:
    """The setting `turn_marker`."""
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, list | tuple) and value:
        return tuple(_check_int("turn_marker", token, 0) for token in value)
    raise HiMAPError(
        "turn_marker",
        f"turn_marker must be a text or a list of token ids, and not empty; got {value!r}",
    )


def parse_criterion(value: Any) -> tuple[CriterionName, CriterionName]:
    """The criteria of both cuts.

    Args:
        value: a name for both; "A+B", or {"shallow": "A", "deep": "B"}, for one each.

    Raises:
        HiMAPError: another form, or an unknown name.
    """
    known = get_args(CriterionName)
    names: list[Any] = []
    match value:
        case str():
            names = value.split("+")
        case {"shallow": shallow, "deep": deep} if len(value) == 2:
            names = [shallow, deep]
    if len(names) not in (1, 2) or any(name not in known for name in names):
        raise HiMAPError(
            "criterion",
            f"criterion must be one of {', '.join(known)}, or two as A+B or "
            f'{{"shallow": A, "deep": B}}, got {value!r}',
        )
    return names[0], names[-1]


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Engine-wide settings; cuts and ratios below are the paper's for 32 layers.

    Attributes:
        shallow_layer: K1, full layers run before the first cut; see `default_cuts`.
        deep_layer: K2, layers run before the second cut; see `default_cuts`.
        shallow_ratio: R1, share of the image tokens dropped at the first cut, for requests that
            do not choose. 0 here and in `deep_ratio` makes pruning opt-in.
        deep_ratio: R2, share of the rest dropped at the second cut, for requests that do not
            choose.
        max_shallow_ratio: highest R1 that a request may ask for; None: anything below 1.
        max_deep_ratio: highest R2 that a request may ask for; None: anything below 1.
        trace_requests: keep the surviving positions of this many latest pruned prompts for
            inspection (`himap_trace`); costs a copy to the host per pruned prompt.
        criterion: how survivors are chosen, a name in `himap_vllm.criteria`; "A+B" means A at the
            first cut and B at the second. "himap" is the paper's.
        position_prior: the file of `himap calibrate` that criteria with a positional prior read.
            None: `himap_prior.json` in the model's folder.
        kv_grouping: how the stages share KV cache groups; see `himap_vllm.plan.grouping`.
        votes: which text votes for an image, for requests that do not choose.
        turn_marker: the text, or the token ids, that open each turn of the assistant in a prompt.
            None: found in the chat template, see `himap_vllm.frontend.turns`.
    """

    shallow_layer: int = 2
    deep_layer: int = 8
    shallow_ratio: float = 0.5
    deep_ratio: float = 0.75
    max_shallow_ratio: float | None = None
    max_deep_ratio: float | None = None
    trace_requests: int = 0
    criterion: str = "uniform+half"
    position_prior: str | None = None
    kv_grouping: KVGrouping = "balanced"
    votes: Votes = "turn"
    turn_marker: str | tuple[int, ...] | None = None

    @property
    def needs_text(self) -> bool:
        """Whether a criterion reads text behind an image."""
        return any(criterion not in NEEDS_NO_TEXT for criterion in self.criteria)

    @property
    def criteria(self) -> tuple[CriterionName, CriterionName]:
        """The criteria of the first and of the second cut."""
        return parse_criterion(self.criterion)

    @property
    def prior_layers(self) -> tuple[int, ...]:
        """Layers before the cuts whose criterion reads a positional prior."""
        cuts = zip((self.shallow_layer, self.deep_layer), self.criteria, strict=True)
        return tuple(layer for layer, criterion in cuts if criterion in READS_PRIOR)

    @classmethod
    def parse(cls, raw: Any, num_layers: int = 32, first_cut: int = 1) -> EngineSettings:
        """Settings from the JSON value under `additional_config["himap"]`.

        Args:
            raw: the value.
            num_layers: of the decoder, for cuts that `raw` does not name.
            first_cut: least K1 of the model, likewise.

        Raises:
            HiMAPError: wrong type, unknown key, or a value out of range.
        """
        if not isinstance(raw, Mapping):
            raise HiMAPError(
                ADDITIONAL_CONFIG_KEY,
                f'additional_config["himap"] must be an object, got {type(raw).__name__}',
            )
        known = [field.name for field in fields(cls)]
        for key in raw:
            if key not in known:
                raise HiMAPError(
                    str(key), f"unknown himap setting {key!r}; known: {', '.join(known)}"
                )
        shallow, deep = default_cuts(num_layers, first_cut)
        if "shallow_layer" in raw:
            deep = max(deep, _check_int("shallow_layer", raw["shallow_layer"], 1) + 1)
        elif "deep_layer" in raw:
            shallow = min(shallow, _check_int("deep_layer", raw["deep_layer"], 2) - 1)
        settings = cls(**{"shallow_layer": shallow, "deep_layer": deep, **raw})
        criteria = parse_criterion(settings.criterion)
        settings = replace(
            settings,
            criterion="+".join(dict.fromkeys(criteria)),
            turn_marker=_parse_marker(settings.turn_marker),
        )
        _check_int("shallow_layer", settings.shallow_layer, 1)
        _check_int("deep_layer", settings.deep_layer, 2)
        _check_int("trace_requests", settings.trace_requests, 0)
        if not isinstance(settings.position_prior, str | None):
            raise HiMAPError(
                "position_prior",
                f"position_prior must be the path of a file, got {settings.position_prior!r}",
            )
        _check_name("kv_grouping", settings.kv_grouping, get_args(KVGrouping))
        _check_name("votes", settings.votes, get_args(Votes))
        if settings.shallow_layer >= settings.deep_layer:
            raise HiMAPError(
                "deep_layer",
                f"deep_layer must be greater than shallow_layer ({settings.shallow_layer}), "
                f"got {settings.deep_layer}",
            )
        for name in ("shallow_ratio", "deep_ratio"):
            maximum = getattr(settings, f"max_{name}")
            if maximum is not None:
                check_ratio(f"max_{name}", maximum)
            check_ratio(name, getattr(settings, name), maximum)
        return settings

    def check_depth(self, num_layers: int, first_cut: int = 1) -> None:
        """Raise HiMAPError unless both cuts lie inside a decoder of `num_layers` layers.

        Args:
            num_layers: of the decoder.
            first_cut: least K1 of the model: its deepstack features are added in layers before it.
        """
        if self.shallow_layer < first_cut:
            raise HiMAPError(
                "shallow_layer",
                f"shallow_layer must be at least {first_cut} for this model, got "
                f"{self.shallow_layer}: visual features are added after each of its first "
                f"{first_cut} layers",
            )
        if self.deep_layer >= num_layers:
            raise HiMAPError(
                "deep_layer",
                f"deep_layer must be below the decoder's {num_layers} layers, "
                f"got {self.deep_layer}; set shallow_layer and deep_layer for this model",
            )


def is_requested(additional_config: Any) -> bool:
    """Whether an engine is configured to prune."""
    return (
        isinstance(additional_config, Mapping)
        and additional_config.get(ADDITIONAL_CONFIG_KEY) is not None
    )


def engine_settings(additional_config: Any) -> EngineSettings | None:
    """Return the settings of an engine that is configured to prune, or None for other engines."""
    if not is_requested(additional_config):
        return None
    return EngineSettings.parse(additional_config[ADDITIONAL_CONFIG_KEY])


@dataclass(frozen=True, slots=True)
class RequestedRatios:
    """How a request is to be pruned.

    Attributes:
        images: the ratios of each image, in prompt order.
        prunes: whether any ratio is above 0, also those that would hold for images if there were
            any.
        asked: whether the request itself has such a ratio, and is refused if it can't be pruned.
        votes: which text votes.
    """

    images: tuple[Ratios, ...]
    prunes: bool
    asked: bool
    votes: Votes


def requested_ratios(
    settings: EngineSettings, extra_args: Mapping[str, Any] | None, num_images: int
) -> RequestedRatios:
    """Return how a request is to be pruned.

    Args:
        settings: the engine's settings: defaults and bounds.
        extra_args: `SamplingParams.extra_args`, `vllm_xargs` over HTTP.
        num_images: of the prompt.

    Raises:
        HiMAPError: an unknown key beginning with `himap`, a ratio out of range, a list that has
            not one for each image, or votes of another name.
    """
    args = extra_args or {}
    for key in args:
        if str(key).startswith(_ARG_PREFIX) and key not in _ARGS:
            raise HiMAPError(key, f"unknown parameter {key!r}; known: {', '.join(_ARGS)}")
    if_possible = args.get(IF_POSSIBLE_ARG, False)
    if if_possible not in (False, True):  # 0 and 1 over HTTP
        raise HiMAPError(
            IF_POSSIBLE_ARG, f"{IF_POSSIBLE_ARG} must be true or false, got {if_possible!r}"
        )
    votes = args.get(VOTES_ARG, settings.votes)
    _check_name(VOTES_ARG, votes, get_args(Votes))
    chosen: list[list[float]] = []
    asked = False
    for key, default, maximum in (
        (SHALLOW_ARG, settings.shallow_ratio, settings.max_shallow_ratio),
        (DEEP_ARG, settings.deep_ratio, settings.max_deep_ratio),
    ):
        chosen.append(_of_each_image(key, args.get(key, default), maximum, num_images))
        asked |= key in args and any(chosen[-1])
    return RequestedRatios(
        images=tuple(map(Ratios, *chosen))[:num_images],
        prunes=any(map(any, chosen)),
        asked=asked and not if_possible,
        votes=votes,
    )


def requested_trace(extra_args: Mapping[str, Any] | None) -> str | None:
    """The name under which a request wants its trace to be kept (`himap_take_trace`), or None.

    Raises:
        HiMAPError: it is not a string of 1 to 64 characters.
    """
    name = (extra_args or {}).get(TRACE_ARG)
    if name is None or (isinstance(name, str) and 0 < len(name) <= _MAX_TRACE_NAME):
        return name
    raise HiMAPError(
        TRACE_ARG, f"{TRACE_ARG} must be a name of 1 to {_MAX_TRACE_NAME} characters, got {name!r}"
    )


def _of_each_image(
    parameter: str, value: Any, maximum: float | None, num_images: int
) -> list[float]:
    """The ratio of each image; of one, where a number is given and there are no images."""
    if not isinstance(value, list | tuple):
        return [check_ratio(parameter, value, maximum)] * max(1, num_images)
    if len(value) != num_images:
        raise HiMAPError(
            parameter,
            f"{parameter} must be a number, or a list of {num_images}, one for each image of the "
            f"prompt; got a list of {len(value)}",
        )
    return [
        check_ratio(f"{parameter}[{index}]", ratio, maximum) for index, ratio in enumerate(value)
    ]
