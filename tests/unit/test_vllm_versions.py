# SPDX-License-Identifier: Apache-2.0
"""The module that knows what differs between vLLM's minors."""

from __future__ import annotations

import os

import pytest
import vllm
import vllm.envs as envs

from himap_vllm import vllm_versions


@pytest.mark.parametrize("name", sorted(vllm_versions.MOVED))
def test_moved_names_are_found(name: str) -> None:
    assert getattr(vllm_versions, name) is not None


def test_a_name_that_no_minor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vllm_versions.MOVED, "gone", ("vllm.no.such", "vllm.logger"))
    with pytest.raises(AttributeError, match=r"has no gone beside vLLM \d"):
        vllm_versions.gone  # noqa: B018


def test_a_missing_dependency_is_not_a_moved_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]
) -> None:
    with open(os.path.join(tmp_path, "needy.py"), "w") as file:
        file.write("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(vllm_versions.MOVED, "needy", ("needy", "vllm.logger"))
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        vllm_versions.needy  # noqa: B018


@pytest.mark.parametrize(
    ("version", "supported", "cautious"),
    [
        ("0.31.2", False, False),
        ("0.32.0+cpu", True, False),
        ("0.33.0", True, True),
        ("0.33.1+cu130", True, True),
        ("0.34.0", False, False),
    ],
)
def test_minors(
    monkeypatch: pytest.MonkeyPatch, version: str, supported: bool, cautious: bool
) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    assert vllm_versions.is_supported() == supported
    caution = vllm_versions.not_run()
    assert (caution is not None) == cautious
    if caution is not None:
        assert version in caution
        assert "Not checked: its own libraries" in caution


def test_media_limit_where_vllm_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = vllm_versions.MEDIA_BYTES
    monkeypatch.setenv(limit, "before")
    monkeypatch.delitem(envs.environment_variables, limit, raising=False)
    vllm_versions.limit_media(1000)
    assert os.environ[limit] == "before"
    monkeypatch.setitem(envs.environment_variables, limit, lambda: 0)
    vllm_versions.limit_media(1000)
    assert os.environ[limit] == "4000"
