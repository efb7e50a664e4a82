# SPDX-License-Identifier: Apache-2.0
"""Pages: links lead somewhere, code says its language, and the picture is what its script draws."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "bench/**/*.md", "training/*.md", "demo/**/*.md")
    for page in ROOT.glob(pattern)
)


def prose(page: Path) -> str:
    """The page without its code."""
    return re.sub(r"^ *```.*?^ *```|`[^`\n]+`", "", page.read_text(), flags=re.DOTALL | re.M)


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    text = prose(page)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    links += re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    broken = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("name", PAGES)
def test_links(name: str) -> None:
    assert broken_links(ROOT / name) == []


def test_broken_links_are_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](#one) [b](#two) [c](gone.md)\n```md\n[d](gone.md)\n```\n")
    assert broken_links(page) == ["#two", "gone.md"]


@pytest.mark.parametrize("name", PAGES)
def test_code_says_its_language(name: str) -> None:
    fences = re.findall(r"^ *```(.*)$", (ROOT / name).read_text(), re.MULTILINE)
    assert all(fences[::2]), f"opening fences: {fences[::2]}"


def test_the_picture_is_current() -> None:
    script = str(ROOT / "docs/pictures/mechanism.py")
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
