# SPDX-License-Identifier: Apache-2.0
"""Where a setting comes from, and what is said of a bad one."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
from himap_server.security.store_urls import address_of
from himap_server.settings import SettingsError, load, split_file


def test_flags_go_before_environment_before_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIMAP_MAX_IMAGES", "3")
    monkeypatch.setenv("HIMAP_MAX_BODY_BYTES", "30")
    monkeypatch.setenv("HIMAP_DEEP_RATIO", "0.3")
    file = {"max_images": 4, "max_body_bytes": 40, "image_timeout": 4, "shallow_ratio": 0.4}
    gateway, engine = load({"max_images": "2", "grace_seconds": None}, file)
    assert (gateway.max_images, gateway.max_body_bytes) == (2, 30)
    assert (gateway.image_timeout, gateway.grace_seconds) == (4.0, 30.0)
    assert engine == {"shallow_ratio": 0.4, "deep_ratio": 0.3}


def test_user_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIMAP_IMAGE_USER_AGENT", "me/1.0 (https://x.test; me@x.test)")
    assert load({}, {})[0].image_user_agent == "me/1.0 (https://x.test; me@x.test)"
    assert load({"image_user_agent": "x"}, {})[0].image_user_agent == "x"


@pytest.mark.parametrize("hosts", ["A.example, b:8080", ["a.example", "b:8080"]])
def test_hosts(hosts: object) -> None:
    gateway, _ = load({}, {"image_hosts": hosts})
    assert gateway.image_hosts == {"a.example", "b:8080"}


@pytest.mark.parametrize("given", ["0.9, 0.5", [0.9, 0.5]])
def test_low_detail(monkeypatch: pytest.MonkeyPatch, given: object) -> None:
    assert load({}, {})[0].low_detail == (0.75, 0.75)
    assert load({}, {"low_detail": given})[0].low_detail == (0.9, 0.5)
    monkeypatch.setenv("HIMAP_LOW_DETAIL", "0,0")
    assert load({}, {"low_detail": given})[0].low_detail == (0, 0)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("max_images", "many", "max-images: .*integer.*many"),
        ("request_timeout", "0", "request-timeout: .*greater than 0"),
        ("fetch_images", "perhaps", "fetch-images: .*boolean"),
        ("image_hosts", "http://x/y", "image-hosts: .*host:port"),
        ("image_user_agent", "a\r\nX: b", "image-user-agent: .*pattern"),
        ("image_user_agent", "", "image-user-agent: .*pattern"),
        ("image_user_agent", "caf\xe9", "image-user-agent: .*pattern"),
        ("low_detail", "0.75", "low-detail: .*two ratios in .*0, 1.*separated by a comma, got"),
        ("low_detail", "0.1,0.2,0.3", "low-detail: .*two ratios"),
        ("low_detail", "0.75,1", "low-detail.*: .*less than 1"),
        ("low_detail", "-0.1,0", "low-detail.*: .*greater than or equal to 0"),
        ("low_detail", "nan,0", "low-detail.*: .*"),
        ("low_detail", "a,b", "low-detail.*: .*number"),
        ("shallow_layer", "1.5", "shallow-layer: .*integer"),
    ],
)
def test_a_bad_value_is_named(name: str, value: str, text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        load({name: value}, {})


def test_a_store_of_limits() -> None:
    file = {"api_keys_file": "keys.yaml"}
    url = "redis://user:secret@store:6380/1"
    gateway, _ = load({"limits_storage": url}, file)
    assert gateway.limits_storage is not None
    assert gateway.limits_storage.get_secret_value() == url
    assert gateway.limits_storage_failure == "local"
    assert "secret" not in repr(gateway)
    assert load({"limits_storage": ""}, file)[0].limits_storage is None
    with pytest.raises(SettingsError, match="limits-storage: needs api-keys-file"):
        load({"limits_storage": url}, {})


@pytest.mark.parametrize(
    "url", ["http://:secret@a", "redis://:secret@a:b", "redis://:secret@", "redis://:secret@[a"]
)
def test_no_message_has_a_password(url: str) -> None:
    with pytest.raises(SettingsError, match=r"limits-storage: .*must be redis://") as error:
        load({"limits_storage": url}, {"api_keys_file": "keys.yaml"})
    assert "secret" not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://a", "redis://a:6379"),
        ("rediss://user:secret@a:1/2", "rediss://a:1/2"),
        ("valkeys://:secret@[::1]", "valkeys://::1:6379"),
    ],
)
def test_addresses_of_stores_have_no_password(url: str, address: str) -> None:
    assert address_of(url) == address


def test_one_file_for_the_gateway_and_vllm(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("model: m\nmax-images: 2\nshallow_ratio: 0.1\ntensor-parallel-size: 2\n")
    ours, vllms = split_file(file)
    assert ours == {"max_images": 2, "shallow_ratio": 0.1}
    assert vllms == {"model": "m", "tensor_parallel_size": 2}


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [", "5"])
def test_a_file_that_is_none(tmp_path: Path, content: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(content)
    with pytest.raises(SettingsError, match="--config"):
        split_file(file)
    with pytest.raises(SettingsError, match="can't be read"):
        split_file(tmp_path / "none.yaml")
