# SPDX-License-Identifier: Apache-2.0
"""API keys: a YAML file of their hashes, read again whenever it changes.

    keys:
      - name: team-a                    # for the logs and metrics
        sha256: 9f86d081884c7d659a2f...
        requests_per_minute: 600        # this and all below may be left out
        max_concurrent: 16
        shallow_ratio: [0, 0.5]         # ratios that requests with this key may have
        deep_ratio: [0, 0.9]

A key is 256 random bits (`himap key NAME` makes one). Nobody can search for the text of a SHA-256
hash of so many bits; a password would need a slower hash.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import yaml
from prometheus_client import Counter
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from himap_vllm.config import EngineSettings

logger = logging.getLogger("vllm.himap.server")  # vLLM is not imported: `himap key` is done at once

_ERRORS = Counter("himap_api_key_file_errors", "times the changed file of API keys was unusable")


def _check_range(bounds: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= bounds[0] <= bounds[1] < 1:
        raise ValueError("must be [lowest, highest] with 0 <= lowest <= highest < 1")
    return bounds


RatioRange = Annotated[tuple[float, float], AfterValidator(_check_range)]


class Key(BaseModel):
    """An API key and its limits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    requests_per_minute: int | None = Field(default=None, gt=0)
    max_concurrent: int | None = Field(default=None, gt=0)
    shallow_ratio: RatioRange | None = None
    deep_ratio: RatioRange | None = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: tuple[Key, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> _File:
        for field in ("name", "sha256"):
            values = [getattr(key, field) for key in self.keys]
            if len(set(values)) < len(values):
                raise ValueError(f"two keys have the same {field}")
        return self


class KeyFileError(ValueError):
    """The file can't be used. The message says why, without quoting the file."""


def read_keys(path: Path, engine: EngineSettings | None = None) -> tuple[Key, ...]:
    """The keys in a file.

    Args:
        path: the file.
        engine: settings with the highest ratios that the engine takes; None: not known yet.

    Raises:
        KeyFileError: the file can't be read, or something in it is wrong.
    """
    try:
        keys = _File.model_validate(yaml.safe_load(path.read_text())).keys
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise KeyFileError(f"{path}: {where or 'keys'}: {first['msg']}") from error
    # ValueError: bytes that are not UTF-8, and impossible dates.
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise KeyFileError(f"{path} is not YAML") from error
    if engine is not None:
        _check_maxima(path, keys, engine)
    return keys


def _check_maxima(path: Path, keys: Sequence[Key], engine: EngineSettings) -> None:
    """Raise KeyFileError if a key demands ratios that the engine refuses."""
    for number, key in enumerate(keys):
        for field in ("shallow_ratio", "deep_ratio"):
            bounds: RatioRange | None = getattr(key, field)
            maximum: float | None = getattr(engine, f"max_{field}")
            if bounds is not None and maximum is not None and bounds[0] > maximum:
                raise KeyFileError(
                    f"{path}: keys.{number}.{field}: the lowest ratio must be at most "
                    f"--max-{field.replace('_', '-')} {maximum:g}, got {bounds[0]:g}"
                )


class KeyRing:
    """The keys of a file, read again whenever the file changes.

    If the file becomes unreadable or wrong, the old keys stay, and the log and a metric say so.
    """

    def __init__(self, path: Path, engine: EngineSettings | None = None) -> None:
        """Read the file. Arguments and errors are those of `read_keys`."""
        self._path = path
        self._engine = engine
        self._seen = self._signature()
        self._keys = read_keys(path, engine)

    def find(self, token: str) -> Key | None:
        """The key with this token, or None.

        The time it takes does not depend on the token.
        """
        self._refresh()
        digest = hashlib.sha256(token.encode(errors="surrogateescape")).hexdigest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def _refresh(self) -> None:
        signature = self._signature()
        if signature == self._seen:
            return
        self._seen = signature
        try:
            self._keys = read_keys(self._path, self._engine)
            logger.info("API keys read again: %d", len(self._keys))
        except KeyFileError as error:
            _ERRORS.inc()
            logger.error("API keys stay as they were: %s", error)

    def _signature(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size


def make_key(name: str) -> tuple[str, str]:
    """Make a key; returns its token and its entry for the file.

    Raises:
        ValueError: the name has other characters than letters, digits and ._-, or too many.
    """
    token = f"himap-{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(token.encode()).hexdigest()
    key = Key(name=name, sha256=digest)
    # Quoted, because YAML does not read 123 and no as text.
    return token, f'  - name: "{key.name}"\n    sha256: "{key.sha256}"\n'
