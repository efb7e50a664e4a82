# SPDX-License-Identifier: Apache-2.0
"""The playground in a real browser: Debian's Chromium, against one server of the bundled model."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from tests import programs
from tests.gateway.guarded import make_key
from tests.gateway.support import HIMAP
from tests.servers import Server, running

MARK = "<img src=x onerror=\"document.title='run'\">"
"""What would change the title if it were taken for HTML."""
SHOTS = os.environ.get("HIMAP_SCREENSHOTS")
"""A folder for screenshots of the story."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """The bundled model behind one API key, and the key."""
    folder = tmp_path_factory.mktemp("playground")
    key, entry = make_key("browser")
    (folder / "keys.yaml").write_text(yaml.safe_dump({"keys": [entry]}))
    command = [
        HIMAP, "serve", "--enforce-eager", "--api-keys-file", str(folder / "keys.yaml"),
        "--max-image-bytes", "200000", "--max-image-pixels", "250000",
        "--kv-cache-memory-bytes", str(64 << 20),
    ]  # fmt: skip
    log = folder / "log"
    with running(command, {"VLLM_LOGGING_LEVEL": "INFO"}, log) as server:
        server.wait_for("/health/ready")
        yield server, key
        assert f"playground: {server.url}/playground" in log.read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = programs.find("chromium")
        # root has no sandbox
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


Open = Callable[..., Page]


@pytest.fixture
def opened(served: tuple[Server, str], browser: Browser) -> Iterator[Open]:
    """Opens the page. Nothing may be asked of other hosts, and nothing may go wrong unseen."""
    server, _ = served
    contexts, wrong = [], []

    def open_page(key: str | None = served[1], **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=server.url)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: seen(request.url))
        page.on("console", lambda message: said(message.text))
        page.goto(f"{server.url}/playground")
        if key is not None:
            page.get_by_label("API key").fill(key)
            page.get_by_role("button", name="Use").click()
            expect(page.locator("#model")).to_have_text("himap-demo")
        return page

    def seen(url: str) -> None:
        if not url.startswith((server.url, "blob:", "data:")):
            wrong.append(url)

    def said(text: str) -> None:
        if "Content Security Policy" in text:
            wrong.append(text)

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def shot(page: Page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


def ask(page: Page, question: str) -> None:
    page.get_by_label("Question about the picture").fill(question)
    page.get_by_role("button", name=re.compile("^Ask")).click()
    expect(page.locator("#stop")).to_be_hidden(timeout=60_000)


def answers(page: Page) -> list[str]:
    """The latest answers, pruned and unpruned."""
    return [
        page.locator(f"#{side}-log .assistant").last.inner_text().strip()
        for side in ("pruned", "unpruned")
    ]


def costs(page: Page) -> dict[str, list[str]]:
    rows = page.locator("#costs tr").all()
    return {
        row.locator("th").inner_text(): [cell.inner_text() for cell in row.locator("td").all()]
        for row in rows
    }


def coverage(page: Page) -> list[int]:
    """How much of the picture each view covers: opaque pixels of the overlay, in percent."""
    script = """canvas => {
      const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
      let covered = 0;
      for (let i = 3; i < data.length; i += 4) covered += data[i] > 0;
      return Math.round(400 * covered / data.length);
    }"""
    found = []
    for view in ("Picture", "After the first cut", "After the second cut", "Scores"):
        page.get_by_role("radio", name=view).check()
        found.append(int(page.locator("#overlay").evaluate(script)))
    return found


def check_accessibility(page: Page) -> None:
    page.evaluate(programs.AXE.read_text())  # not as a script of the page, which its policy forbids
    found = page.evaluate("axe.run({resultTypes: ['violations']})")
    serious = [
        (violation["id"], [node["html"] for node in violation["nodes"]])
        for violation in found["violations"]
        if violation["impact"] in ("serious", "critical")
    ]
    assert not serious


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_story(opened: Open, theme: Any) -> None:
    page = opened(color_scheme=theme)
    check_accessibility(page)
    page.get_by_role("button", name="a pink card with dog").click()
    expect(page.locator("#stage")).to_be_visible()
    ask(page, "What number is on the cyan card?")
    assert answers(page) == ["59", "59"]
    before = costs(page)
    assert before["Image tokens after the second cut"] == ["41", "324", "87 %"]
    assert before["KV cache entries, all layers"][2].endswith("%")
    # Of 324 cells 162 and 283 are dropped; pixels at edges count twice.
    assert coverage(page) == pytest.approx([0, 50, 87, 100], abs=3)
    page.get_by_role("radio", name="After the second cut").check()

    # A part of the picture, by mouse and by keyboard.
    page.locator("#overlay").click(position={"x": 5, "y": 5})
    place = page.locator("#place")
    expect(place).to_contain_text(re.compile("row 1, column 1: (kept|dropped)"))
    page.locator("#overlay").press("ArrowRight")
    page.locator("#overlay").press("ArrowDown")
    expect(place).to_contain_text("row 2, column 2")
    check_accessibility(page)
    shot(page, f"story-{theme}")

    # A follow-up in the same conversation finds the picture, and shows what was kept of it.
    assert before["Prompt tokens found in the cache"][0] == "0"
    ask(page, "Is there a red cross?")
    assert answers(page) == ["no", "no"]
    found = costs(page)["Prompt tokens found in the cache"]
    assert "Time to first token (both at once)" in costs(page)
    assert int(found[0]) > 324  # the whole picture
    assert int(found[1]) > 0
    assert coverage(page) == pytest.approx([0, 50, 87, 100], abs=3)

    # With other ratios it is computed anew.
    page.locator("#deep").fill("0")
    expect(page.locator("#deep-value")).to_have_text("0 %")
    ask(page, "What shape is the pink object?")
    assert all(answers(page))
    assert page.locator("#pruned-log p").count() == 6
    assert costs(page)["Image tokens after the second cut"][0] == "162"
    assert costs(page)["Prompt tokens found in the cache"][0] == "0"
    assert "Time to first token (both at once)" not in costs(page)  # unlike things
    assert coverage(page) == pytest.approx([0, 50, 50, 100], abs=3)
    expect(page.get_by_text("A pruned prompt with a trace is computed in full.")).to_be_visible()

    page.get_by_text("Reproduce the pruned request").click()
    page.get_by_role("button", name="Copy Python").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert '"deep_ratio": 0' in copied
    compile(copied, "reproduction", "exec")
    page.get_by_role("button", name="New conversation").click()
    assert page.locator("#answers").is_hidden()


def test_the_copied_command_works(opened: Open, served: tuple[Server, str], tmp_path: Path) -> None:
    page = opened()
    page.get_by_role("button", name="a pink card with dog").click()
    expect(page.locator("#stage")).to_be_visible()
    ask(page, "What number isn't on the 'red' card?")
    said = answers(page)[0]
    picture = urllib.request.urlopen(f"{served[0].url}/playground/examples/0.png").read()
    (tmp_path / "picture.png").write_bytes(picture)
    environment = {**os.environ, "API_KEY": served[1]}
    for name, command in (("curl", ["bash", "-s"]), ("python", [sys.executable, "-"])):
        script = page.locator(f"#{name}").text_content() or ""
        done = subprocess.run(
            command, input=script, text=True, capture_output=True, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, done.stderr
        text = (
            json.loads(done.stdout)["choices"][0]["message"]["content"]
            if name == "curl"
            else done.stdout.splitlines()[0]
        )
        assert text.strip() == said


def test_a_phone(opened: Open) -> None:
    page = opened(viewport={"width": 360, "height": 740}, device_scale_factor=2, has_touch=True)
    page.get_by_role("button", name="an orange diamond").click()
    ask(page, "What shape is the purple object?")
    assert answers(page) == ["square", "square"]
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width == 360  # nothing to scroll sideways
    check_accessibility(page)
    shot(page, "phone")


def png(size: tuple[int, int], noise: bool = False) -> bytes:
    file = io.BytesIO()
    pixels = np.full((size[1], size[0], 3), 90, np.uint8)
    if noise:
        pixels = np.random.default_rng(0).integers(0, 255, pixels.shape, dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def choose(page: Page, data: bytes, name: str = "grey.png") -> None:
    page.locator("#file").set_input_files({"name": name, "mimeType": "image/png", "buffer": data})


def test_errors_are_told(opened: Open) -> None:
    page = opened(key=None)
    error = page.get_by_role("alert")
    page.get_by_label("API key").fill("wrong")
    page.get_by_role("button", name="Use").click()
    expect(error).to_contain_text("a valid API key is needed")
    expect(page.get_by_role("button", name="Ask")).to_be_disabled()
    page = opened()
    error = page.get_by_role("alert")
    page.get_by_role("button", name="Ask").click()
    expect(error).to_have_text("Choose a picture first.")
    choose(page, png((300, 300), noise=True), "noise.png")
    expect(error).to_contain_text("noise.png is too large")
    choose(page, b"no picture", "broken.png")
    expect(error).to_contain_text("broken.png is not a picture")
    choose(page, png((600, 600)))
    expect(page.locator("#caption")).to_contain_text("600 \u00d7 600")
    ask(page, "What is it?")
    expect(error).to_contain_text("more than 250000 pixels")
    choose(page, png((300, 200)))  # another one ends the conversation
    expect(page.locator("#answers")).to_be_hidden()
    ask(page, "Which color is it?")
    expect(error).to_have_text("")
    shot(page, "grey")


def test_a_picture_is_pasted(opened: Open) -> None:
    page = opened()
    script = """async bytes => {
      const blob = new Blob([new Uint8Array(bytes)], { type: "image/png" });
      await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
    }"""
    page.evaluate(script, list(png((168, 126))))
    page.get_by_label("Question about the picture").press("Control+V")
    expect(page.locator("#caption")).to_contain_text("168 \u00d7 126 pixels")
    ask(page, "Which color is it?")
    assert all(answers(page))


def test_a_picture_is_dropped(opened: Open, tmp_path: Path) -> None:
    """Dragged from a folder, as the browser gets it. What is no picture changes nothing."""
    page = opened()
    session = page.context.new_cdp_session(page)
    files = tmp_path / "mine.png", tmp_path / "notes.txt"
    files[0].write_bytes(png((126, 168)))
    files[1].write_text("no picture")
    place = page.locator("#question").bounding_box()
    assert place is not None
    for file in files:
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for step, marked in (("dragEnter", False), ("dragOver", True), ("drop", False)):
            at = {"x": place["x"] + 5, "y": place["y"] + 5}
            session.send("Input.dispatchDragEvent", {"type": step, "data": data, **at})
            over = expect(page.locator("#drop.over"))
            over.to_have_count(int(marked))
    expect(page.locator("#caption")).to_have_text("mine.png, 126 \u00d7 168 pixels")
    assert page.url.endswith("/playground")  # the browser did not open the file
    ask(page, "Which color is it?")
    assert all(answers(page))


def test_nothing_is_taken_for_html(opened: Open) -> None:
    """Answers, file names and errors, all from the real server."""
    page = opened()
    choose(page, png((168, 168)), f"{MARK}.png")
    expect(page.locator("#caption")).to_contain_text(MARK)

    def with_answer(route: Route) -> None:
        body = json.loads(route.request.post_data or "")
        body["structured_outputs"] = {"choice": [MARK]}
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", with_answer)
    ask(page, f"{MARK}?")
    assert answers(page) == [MARK, MARK]
    assert page.locator("#pruned-log .user").inner_text() == f"{MARK}?"
    page.unroute("**/v1/chat/completions")

    def with_model(route: Route) -> None:
        body = {**json.loads(route.request.post_data or ""), "model": MARK}
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", with_model)
    ask(page, "Again?")
    expect(page.get_by_role("alert")).to_contain_text(MARK)
    assert page.title() == "HiMAP playground"
    assert page.locator("img[src=x]").count() == 0


def test_the_page_has_no_inline_code_and_a_strict_policy(served: tuple[Server, str]) -> None:
    with urllib.request.urlopen(f"{served[0].url}/playground") as response:
        page, policy = response.read().decode(), response.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert re.findall(r"<script\b[^>]*>(.*?)</script>", page, re.DOTALL) == [""]
    assert not re.search(r"<style|\son\w+=|\sstyle=|https?://", page)
    for path in ("nothing.js", "../app.py", "..%2froutes.py", "examples/9.png", "examples/a.png"):
        request = f"{served[0].url}/playground/{path}"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(request)


def test_a_server_that_shuts_down(opened: Open, served: tuple[Server, str]) -> None:
    """The last test: it ends the server. The answer in flight ends as usual, and no other begins.

    Then nothing answers at all.
    """
    server, _ = served
    page, other = opened(), opened()
    for one in (page, other):
        one.get_by_role("button", name="an orange diamond").click()
        expect(one.locator("#stage")).to_be_visible()

    def with_long_answer(route: Route) -> None:
        body = {**json.loads(route.request.post_data or ""), "ignore_eos": True}
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", with_long_answer)
    page.get_by_role("button", name=re.compile("^Ask")).click()
    expect(page.locator("#pruned-log .assistant")).not_to_be_empty()
    server.process.send_signal(signal.SIGTERM)
    error = other.get_by_role("alert")
    ask(other, "What shape is the yellow object?")
    expect(error).to_have_text("the server is shutting down")
    expect(other.get_by_role("button", name="Ask")).to_be_enabled()
    shot(other, "draining")
    expect(page.locator("#stop")).to_be_hidden(timeout=60_000)
    expect(page.get_by_role("alert")).to_be_empty()
    assert all(answers(page))
    assert server.process.wait(60) == 0
    ask(other, "Is anybody there?")
    expect(error).to_have_text("The server does not answer.")
