# SPDX-License-Identifier: Apache-2.0
"""The operator's settings: flags, then environment (`HIMAP_...`), then keys of a YAML file.

The first that is given wins. The YAML file (`--config`) may also hold flags of `vllm serve`.
"""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, BooleanOptionalAction
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml
from pydantic import Field, SecretStr, ValidationError, create_model, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from himap_vllm.config import EngineSettings

from .security.fetch import USER_AGENT, host_and_port
from .security.store_urls import address_of

_SECRET = frozenset({"limits_storage"})
"""Settings whose values may have passwords."""


class SettingsError(ValueError):
    """A setting that can't be used. The message names it."""


class _Operators(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="HIMAP_", extra="ignore")


_Ratio = Annotated[float, Field(ge=0, lt=1)]


class GatewaySettings(_Operators):
    """Settings of the gateway itself. Sizes are in bytes, times in seconds."""

    api_keys_file: Path | None = Field(
        None, description="YAML file of API keys (docs/gateway.md); without one, /v1 is open"
    )
    limits_storage: SecretStr | None = Field(
        None,
        description="redis://, rediss://, valkey:// or valkeys:// of a server in which replicas "
        "count the requests of API keys together; without one, each process counts for itself. A "
        "password belongs in HIMAP_LIMITS_STORAGE: other users of the machine see flags",
    )
    limits_storage_failure: Literal["local", "refuse"] = Field(
        "local",
        description="while that server does not answer: each process counts for itself, or "
        "requests of keys with limits get 503",
    )
    max_body_bytes: int = Field(64 << 20, gt=0, description="largest request body")
    max_prompt_tokens: int | None = Field(
        None, gt=0, description="longest prompt, image tokens included (default: --max-model-len)"
    )
    max_images: int = Field(16, ge=0, description="most images in one request")
    max_image_bytes: int = Field(20 << 20, gt=0, description="largest encoded image")
    max_image_pixels: int = Field(50_000_000, gt=0, description="largest image, width x height")
    max_request_pixels: int = Field(
        200_000_000,
        gt=0,
        description="pixels of all images of a request together, scaled down as far as the model's "
        "processor allows",
    )
    max_named_image_bytes: int = Field(
        256 << 20,
        ge=0,
        description="encoded images that are kept for API keys that name them by uuid; 0: none",
    )
    min_image_side: int = Field(8, gt=0, description="smallest width and height")
    fetch_images: bool = Field(
        True, description="fetch images by http(s); otherwise only data URLs are taken"
    )
    image_hosts: Annotated[frozenset[str], NoDecode] = Field(
        frozenset(),
        description="comma-separated host or host:port, from which images may be fetched even if "
        "the host is not public or the port is not 80 or 443",
    )
    image_timeout: float = Field(10.0, gt=0, description="seconds for fetching one image")
    image_user_agent: str = Field(
        USER_AGENT,
        pattern=r"^[!-~]([ -~]{0,254}[!-~])?$",
        description="User-Agent header of fetches: a name, a version and how to reach the "
        "operator, in at most 256 printable ASCII characters",
    )
    low_detail: Annotated[tuple[_Ratio, _Ratio], NoDecode] = Field(
        (0.75, 0.75),
        description='ratios of images with "detail": "low", as 0.75,0.75; at most '
        "--max-shallow-ratio and --max-deep-ratio",
    )
    allow_traces: bool = Field(
        True, description='requests may ask which image tokens were kept ("himap": {"trace": true})'
    )
    playground: bool | None = Field(
        None,
        description="serve a page at /playground that asks about pictures and shows what was kept "
        "(default: only if --host is a loopback address)",
    )
    request_timeout: float = Field(600.0, gt=0, description="seconds for a whole request")
    keep_alive_timeout: int = Field(
        620,
        gt=0,
        description="seconds after which an idle connection is closed: more than the proxy in "
        "front waits. VLLM_HTTP_TIMEOUT_KEEP_ALIVE sets it, too",
    )
    header_timeout: float = Field(30.0, gt=0, description="seconds for the headers of a request")
    grace_seconds: float = Field(
        30.0, ge=0, description="seconds for requests in flight after SIGTERM"
    )

    @field_validator("low_detail", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        pair = value.split(",") if isinstance(value, str) else value
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError("must be two ratios in [0, 1), separated by a comma")
        return tuple(pair)

    @field_validator("playground", mode="before")
    @classmethod
    def _unless_empty(cls, value: Any) -> Any:
        return None if value == "" else value  # compose files hand on what is not set

    @field_validator("limits_storage", mode="before")
    @classmethod
    def _is_store(cls, value: Any) -> Any:
        if not value:
            return None  # compose files hand on what is not set
        address_of(str(value))
        return value

    @field_validator("image_hosts", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        hosts = value.split(",") if isinstance(value, str) else value
        names = frozenset(str(host).strip().lower() for host in hosts if str(host).strip())
        for name in names:
            host_and_port(name)
        return names


# The engine's settings as flags; None if the operator gives none. `EngineSettings.parse` checks the
# ranges, because the plugin also runs without the gateway.
_ENGINE_FIELDS: dict[str, Any] = {
    field.name: (
        get_type_hints(EngineSettings)[field.name] | None,
        Field(None, description=f"see docs/engine.md (default: {field.default})"),
    )
    for field in fields(EngineSettings)
    if field.default is not MISSING
}
_ENGINE_FIELDS["criterion"] = (str | dict[str, str] | None, _ENGINE_FIELDS["criterion"][1])
EngineFlags: Any = create_model("EngineFlags", __base__=_Operators, **_ENGINE_FIELDS)


def add_flags(parser: ArgumentParser) -> None:
    """Add a flag for every setting. One that is not given is None; pydantic checks the values."""
    for title, model in (("himap engine", EngineFlags), ("himap gateway", GatewaySettings)):
        group = parser.add_argument_group(title)
        for name, field in model.model_fields.items():
            flag = f"--{name.replace('_', '-')}"
            text = str(field.description)
            if field.default is not None and field.default != frozenset():
                text += f" (default: {field.default})"
            if field.annotation in (bool, bool | None):
                group.add_argument(flag, action=BooleanOptionalAction, default=None, help=text)
            else:
                group.add_argument(flag, default=None, help=text)


def setting_names() -> frozenset[str]:
    """Names of all settings: keys of the YAML file, and attributes of the parsed flags."""
    return frozenset(EngineFlags.model_fields) | frozenset(GatewaySettings.model_fields)


def split_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings in the YAML file, and the flags of vLLM in it.

    Raises:
        SettingsError: the file can't be read, or is not a mapping.
    """
    try:
        raw = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"--config: {path} can't be read: {error}") from error
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise SettingsError(f"--config: {path} must hold `name: value` lines")
    named = {key.lstrip("-").replace("-", "_"): value for key, value in raw.items()}
    ours = setting_names()
    return (
        {key: value for key, value in named.items() if key in ours},
        {key: value for key, value in named.items() if key not in ours},
    )


def load(
    flags: Mapping[str, Any], file: Mapping[str, Any]
) -> tuple[GatewaySettings, dict[str, Any]]:
    """The gateway's settings, and the engine's settings that the operator gave.

    Raises:
        SettingsError: a value of a wrong type or out of range.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    keep_alive = os.environ.get("VLLM_HTTP_TIMEOUT_KEEP_ALIVE")
    vllms = {} if keep_alive is None else {"keep_alive_timeout": keep_alive}
    try:
        gateway = _layered(GatewaySettings, given, {**vllms, **file})
        engine = _layered(EngineFlags, given, file)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        text = f"{name.replace('_', '-')}: {first['msg']}"
        if name in _SECRET:
            raise SettingsError(text) from None
        value = json.dumps(first["input"], default=str)
        raise SettingsError(f"{text}, got {value}") from error
    if gateway.limits_storage is not None and gateway.api_keys_file is None:
        raise SettingsError("limits-storage: needs api-keys-file, which has the limits")
    return gateway, engine.model_dump(exclude_none=True)


def _layered(model: Any, flags: Mapping[str, Any], file: Mapping[str, Any]) -> Any:
    class Layered(model):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            **_: Any,
        ) -> Sequence[PydanticBaseSettingsSource]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, dict(file))

    return Layered(**flags)
