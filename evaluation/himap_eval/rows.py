# SPDX-License-Identifier: Apache-2.0
"""The entries of data files, each with its place for error messages, and their fields."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .items import DataError

Raw = dict[str, Any]
Entry = tuple[str, Raw]
"""The place of an entry (file, and line or number), and its fields."""


def text(raw: Raw, name: str) -> str:
    """A field with a string or a whole number."""
    value = _present(raw, name)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"'{name}' must be a string, got {str(value)[:60]}")
    return str(value)


def texts(raw: Raw, name: str) -> tuple[str, ...]:
    """A field with a string, or a list of at least one string."""
    value = _present(raw, name)
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not value or not all(isinstance(own, str) for own in value):
        raise ValueError(f"'{name}' must be a string, or a list of at least one string")
    return tuple(value)


def number(raw: Raw, name: str) -> int:
    """A field with a whole number, 0 or above, or its digits."""
    value = _present(raw, name)
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).isdecimal():
        raise ValueError(f"'{name}' must be a whole number, 0 or above, got {str(value)[:60]}")
    return int(value)


def objects(raw: Raw, name: str) -> list[Raw]:
    """A field with a list of at least one object."""
    value = _present(raw, name)
    if not isinstance(value, list) or not value or not all(isinstance(own, dict) for own in value):
        raise ValueError(f"'{name}' must be a list of at least one object")
    return value


def _present(raw: Raw, name: str) -> Any:
    if name not in raw:
        raise ValueError(f"'{name}' is missing")
    return raw[name]


def document(path: Path) -> Any:
    """A JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read: {error}") from error


def json_entries(path: Path, key: str | None = None) -> Iterator[Entry]:
    """The entries of a JSON list or object, which may be the field `key` of the file."""
    found = document(path)
    if key is not None:
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, list | dict):
        where = "" if key is None else f" in '{key}'"
        raise DataError(f"{path} must have a list{where}")
    entries = found.items() if isinstance(found, dict) else enumerate(found, start=1)
    for name, raw in entries:
        yield _checked(f"{path}, entry {name}", raw)


def json_lines(path: Path) -> Iterator[Entry]:
    """One JSON object a line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{path}:{number}"
            try:
                yield _checked(place, json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"{place}: {error}") from error


def tab_separated(path: Path) -> Iterator[Entry]:
    """Rows below a line of column names; empty cells are left out."""
    csv.field_size_limit(2**31 - 1)  # a cell may have an image
    place = str(path)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if None in row:
                    raise DataError(f"{place}: more cells than columns")
                yield place, {name: cell for name, cell in row.items() if cell}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{place} can't be read: {error}") from error


def _checked(place: str, raw: Any) -> Entry:
    if not isinstance(raw, dict):
        raise DataError(f"{place}: must be an object with fields")
    return place, raw
