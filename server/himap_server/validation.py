# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a body, as one sentence that names the field.

Pydantic reports an error for each type that a value could have had: hundreds for one item of the
Responses API, whose types are a union. The sentence is about the type that fits best.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from .errors import GatewayError, Reason
from .places import Step, text_of

Errors = Sequence[Mapping[str, Any]]

_MAX_CHARS = 200
_MAX_ERRORS = 10_000  # describing more takes seconds, on the event loop
# Errors that say that a value is of another JSON type.
_OTHER_TYPE = re.compile(r"_type$|^(dict|model|list|iterable|mapping)_|^is_instance_of$|^none_")
_PLAIN = (
    (re.compile(r" or instance of \w+| or object to extract fields from|, (unable|got) .*"), ""),
    (re.compile("a valid dictionary"), "an object"),
    (
        re.compile("Unable to parse input string as an integer, exceeded maximum size"),
        f"Input should be an integer in [{-(2**63)}, {2**63 - 1}]",
    ),
    (re.compile("a valid list|iterable"), "an array"),
    (re.compile("a valid integer"), "an integer"),
    (re.compile("a valid "), "a "),
)


def refusal(error: ValidationError, body: Any, place: Sequence[Step] = ()) -> GatewayError:
    """The refusal of a body.

    Args:
        error: of the validation of what is at `place` of the body.
        body: as it was validated, which tells fields from the names of types in an error's path.
        place: keys and indices.
    """
    if error.error_count() > _MAX_ERRORS:
        return GatewayError(
            400, f"the body has more than {_MAX_ERRORS} errors", reason=Reason.INVALID
        )
    value = body
    for step in place:
        value = value[step]
    path, sentence = _describe(error.errors(include_url=False), value, list(place))
    return GatewayError(400, sentence[: 2 * _MAX_CHARS], reason=Reason.INVALID, param=path or None)


def _describe(errors: Errors, value: Any, path: list[Step]) -> tuple[str, str]:
    """The path of the field at fault, and the sentence."""
    # A union in a union is one union.
    chosen = [
        ([step for step in error["loc"] if not str(step).startswith("union[")], error)
        for error in errors
    ]
    while True:
        here = [error for loc, error in chosen if not loc]
        if here:
            return text_of(path), _sentence(here, path)
        groups: dict[Any, list[tuple[list[Step], Mapping[str, Any]]]] = {}
        for loc, error in chosen:
            groups.setdefault(loc[0], []).append((loc[1:], error))
        fields = [step for step in groups if _is_field(step, value, groups[step])]
        if fields:
            step = fields[0]
            path, chosen = [*path, step], groups[step]
            value = _child(value, step)
            continue
        kind = _unknown_kind(value, groups)
        if kind is not None:
            return text_of([*path, kind]), _kind_sentence(value, [*path, kind])
        chosen = _best(groups, _kind(value))


def _is_field(step: Step, value: Any, errors: list[Any]) -> bool:
    """Whether a step of an error's path is one into the body, and not the name of a type."""
    if isinstance(step, int):
        return isinstance(value, list)
    if isinstance(value, dict) and step in value:
        return True
    return any(not loc and error["type"] == "missing" for loc, error in errors)


def _child(value: Any, step: Step) -> Any:
    try:
        return value[step]
    except (LookupError, TypeError):
        return None


def _kind(value: Any) -> str:
    """The field that tells the types of a union apart."""
    return "type" if isinstance(value, dict) and "type" in value else "role"


def _unknown_kind(value: Any, groups: Mapping[Any, list[Any]]) -> str | None:
    """The field that tells types apart, if it fits none of several."""
    kind = _kind(value)
    if len(groups) < 2 or not isinstance(value, dict):
        return None
    fits = any(not _is_of_other(kind, errors) for errors in groups.values())
    named = any(loc[-1:] == [kind] for errors in groups.values() for loc, _ in errors)
    return None if fits or not named else kind


def _is_of_other(kind: str, errors: list[Any]) -> bool:
    """Whether the value is no attempt at the type that has these errors."""
    return any(
        # `author` is of a class of vLLM's own, which no client sends.
        (loc and loc[-1] in (kind, "author") and len(loc) <= 2) or _is_of_other_type(loc, error)
        for loc, error in errors
    )


def _is_of_other_type(loc: list[Step], error: Mapping[str, Any]) -> bool:
    return not loc and _OTHER_TYPE.search(error["type"]) is not None


def _best(groups: Mapping[Any, list[Any]], kind: str) -> list[Any]:
    """The errors of the type that fits best; of all types, if the value is of none of them."""

    def misfit(errors: list[Any]) -> tuple[bool, bool, int, bool, int]:
        other = _is_of_other(kind, errors)
        return (
            any(_is_of_other_type(loc, error) for loc, error in errors),
            # Not every type has a role.
            other and kind == "type",
            sum(len(loc) == 1 and error["type"] == "missing" for loc, error in errors),
            other,
            len(errors),
        )

    best = min(groups.values(), key=misfit)
    if misfit(best)[0]:
        return [entry for errors in groups.values() for entry in errors if not entry[0]]
    return best


def _sentence(errors: Errors, path: list[Step]) -> str:
    name = text_of(path) or "the body"
    if errors[0]["type"] == "missing":
        return f"{name} is required"
    if errors[0]["type"] == "extra_forbidden":
        return f"{name} is not permitted"
    clauses: dict[str, None] = {}
    for error in errors:
        clause = error["msg"]
        for words, plain in _PLAIN:
            clause = words.sub(plain, clause)
        clauses[clause.removeprefix("Value error, ")] = None
    wanted = [
        clause.removeprefix("Input should be ") for clause in clauses if "should be" in clause
    ]
    if wanted:
        return f"{name} must be {' or '.join(wanted[:3])}"
    return f"{name}: {next(iter(clauses))}"


def _kind_sentence(value: Any, path: list[Step]) -> str:
    kind = path[-1]
    if kind not in value:
        return f"{text_of(path)} is required"
    if not isinstance(value[kind], str):
        return f"{text_of(path)} must be a string"
    return f"{text_of(path)} has an unknown value, {json.dumps(value[kind][:_MAX_CHARS])}"
