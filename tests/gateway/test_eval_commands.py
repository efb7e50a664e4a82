# SPDX-License-Identifier: Apache-2.0
"""`himap eval`, `himap table`, `himap sweep` and `himap demo` as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import sample_images
from tests.data_files import WRITERS
from tests.engines import IMAGE_TOKENS
from tests.gateway.support import HIMAP, client
from tests.servers import Server, picture_message
from tests.world import World

NUM_PICTURES = 4
MAX_TOKENS = "6"


def himap(*args: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command; it must end as expected."""
    environment = {**os.environ, "OPENAI_API_KEY": "none"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    ended = subprocess.run(
        [HIMAP, *args], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == status, ended.stderr[-3000:]
    return ended


@pytest.fixture(scope="module")
def questions(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two questions per picture; accepted is what the unpruned model says to the first."""
    folder = tmp_path_factory.mktemp("questions")
    lines = []
    for index, image in enumerate(sample_images(NUM_PICTURES, seed=8)):
        image.save(folder / f"{index}.png")
        completion = client(server).chat.completions.create(
            model="tiny",
            messages=[picture_message(image, "What is this?")],
            max_tokens=int(MAX_TOKENS),
            temperature=0,
            extra_body={"himap": {"enabled": False}},
        )
        answer = completion.choices[0].message.content
        line = {"image": f"{index}.png", "question": "What is this?", "answers": [answer],
                "kind": "known"}  # fmt: skip
        lines += [line, {**line, "question": "And what is it not?", "kind": "unknown"}]
        lines[-1]["answers"] = ["an answer that no model gives"]
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_eval(server: Server, questions: Path, tmp_path: Path) -> None:
    arguments = (
        "eval", "--url", f"{server.url}/v1", "--data", str(questions), "--max-tokens", MAX_TOKENS,
        "--ratios", "0.5,0.75", "--ratios", "0,0.5", "--output", str(tmp_path),
    )  # fmt: skip
    ended = himap(*arguments)
    assert f"{6 * NUM_PICTURES}/{6 * NUM_PICTURES}" in ended.stderr  # the progress bar
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["model"], found["num_questions"], found["num_groups"]) == ("tiny", 8, 4)
    unpruned, both, deep = found["settings"]
    assert unpruned["accuracy"] == 0.5
    assert unpruned["agreement"] == unpruned["retention"]["value"] == 1.0
    assert unpruned["kinds"]["known"]["accuracy"] == 1.0
    assert unpruned["kinds"]["unknown"]["accuracy"] == 0.0
    assert unpruned["kinds"]["unknown"]["retention"]["value"] is None
    assert unpruned["savings"]["kept_deep"] == IMAGE_TOKENS
    assert both["ratios"] == {"shallow": 0.5, "deep": 0.75}
    assert both["retention"]["value"] == both["accuracy"] / 0.5
    assert both["retention"]["low"] <= both["retention"]["value"] <= both["retention"]["high"]
    assert both["agreement"] < 1.0  # a random model's answers hang on every token
    assert (both["savings"]["kept_shallow"], both["savings"]["kept_deep"]) == (18, 5)
    left = (2 * 36 + 6 * 18 + 4 * 5) / (12 * 36)
    assert both["savings"]["image_token_layers"] == pytest.approx(left)
    assert both["savings"]["kv_tokens"] < deep["savings"]["kv_tokens"] < 1
    assert 0 < both["ttft"] <= both["latency"]
    table = (tmp_path / "results.md").read_text()
    assert "| (0.5, 0.75) |" in table
    assert "| known | 4 | 100.0 % |" in table
    assert table.split("\n\n")[2] in ended.stdout
    assert (tmp_path / "retention.png").stat().st_size > 1000
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["answers"][0]["score"] for answer in answers] == [1.0, 0.0] * NUM_PICTURES

    plain = ("--xargs", "--limit", "4", "--no-plot", "--min-retention", "1.01", "--quiet")
    ended = himap(*arguments, *plain, status=1)
    assert "retention at (0.5, 0.75) is" in ended.stderr
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["num_questions"] == 4
    assert again["settings"][1]["savings"]["kept_deep"] == 5


def test_published_formats_beside_published_rows(server: Server, tmp_path: Path) -> None:
    """Every format once; the cuts of the server, and ratios that reach the budgets with them."""
    sets: list[str] = []
    several = ("mmbench-circular", "refcoco-pixels", "refcoco-unit", "refcoco-square")
    writers = {name: write for name, write in WRITERS.items() if name not in several}
    for data_format, write in writers.items():
        (tmp_path / data_format).mkdir()
        sets += ["--set", f"{data_format}={write(tmp_path / data_format)}"]
    folder = tmp_path / "table"
    arguments = (
        "table", "llava-1.5-7b", *sets, "--url", f"{server.url}/v1", "--max-tokens", MAX_TOKENS,
        "--no-plot", "--quiet", "--output", str(folder), "--budgets",
    )  # fmt: skip
    refused = himap(*arguments, "192,288", status=2)
    assert "the server refuses the ratios" in refused.stderr
    assert "--max-deep-ratio, would do: Error code: 400" in refused.stderr
    ended = himap(*arguments, "288,64")
    found = json.loads((folder / "table.json").read_text())
    assert (found["cuts"], found["num_layers"]) == ([2, 8], 12)
    assert found["ratios"]["64"] is None  # two of twelve layers are a sixth
    names = [name.replace("jsonl", "jsonl-questions") for name in writers]
    assert list(found["data_sets"]) == names
    for unpruned, pruned in found["data_sets"].values():
        assert unpruned["savings"]["image_token_layers"] == 1
        assert pruned["savings"]["image_token_layers"] == pytest.approx(0.5, abs=0.02)
    text = (folder / "table.md").read_text()
    assert text.split("\n\n")[2] in ended.stdout
    assert "| **this server** | decoder | " in text
    assert "| PriorTR | decoder | - | 94.5 % | 12 | PriorTR (arXiv 2606.24156) |" in text
    assert text.count("MSDG-Prune |") == 6
    for name in names:
        assert f"| {name} | " in text
    kinds = (folder / "jsonl-questions" / "results.md").read_text()
    assert "| question 2 | 1 | " in kinds


def test_conversations(server: Server, questions: Path, tmp_path: Path) -> None:
    """The second question sees the first one, and the answer that the history has."""
    seen = []
    for history in ("own", "reference"):
        himap(
            "eval", "--url", f"{server.url}/v1", "--data", str(questions), "--turns", "2",
            "--history", history, "--max-tokens", MAX_TOKENS, "--no-plot", "--quiet",
            "--output", str(tmp_path),
        )  # fmt: skip
        found = json.loads((tmp_path / "results.json").read_text())
        kinds = found["settings"][1]["kinds"]
        assert [kinds[kind]["num_items"] for kind in ("question 1", "question 2")] == [4, 4]
        lines = (tmp_path / "answers.jsonl").read_text().splitlines()
        answers = [[own["answer"] for own in json.loads(line)["answers"]] for line in lines]
        seen.append(answers)
    image = sample_images(1, seed=8)[0]
    first, second = seen[0][:2]
    asked = [picture_message(image, "What is this?"), {"role": "assistant", "content": first[1]},
             {"role": "user", "content": "And what is it not?"}]  # fmt: skip
    completion = client(server).chat.completions.create(
        model="tiny", messages=asked, max_tokens=int(MAX_TOKENS), temperature=0
    )
    assert completion.choices[0].message.content == second[1]
    # The accepted first answers are the unpruned ones, so histories differ where pruned.
    assert [row[1] for row in seen[0][::2]] == [row[1] for row in seen[1][::2]]
    assert [row[1] for row in seen[0][1::2]] != [row[1] for row in seen[1][1::2]]


def test_failed_requests_are_counted(server: Server, questions: Path, tmp_path: Path) -> None:
    file = questions.with_name("failing.jsonl")
    lines = questions.read_text().splitlines()
    broken = {**json.loads(lines[0]), "image": "data:image/png;base64,AAAA"}
    file.write_text("\n".join([lines[0], json.dumps(broken)]))
    ended = himap(
        "eval", "--url", f"{server.url}/v1", "--data", str(file), "--max-tokens", MAX_TOKENS,
        "--no-plot", "--output", str(tmp_path), status=1,
    )  # fmt: skip
    assert "2 of 4 requests failed: Error code: 400" in ended.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["num_questions"], found["num_failed"]) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("eval", "--data", "none.jsonl"), "none.jsonl can't be read"),
        (("eval", "--ratios", "0.5"), "must be SHALLOW,DEEP such as 0.5,0.75, got '0.5'"),
        (("eval", "--ratios", "0.5,1"), "must be a ratio in [0, 1), got '1'"),
        (("table", "llava-1.5-7b", "--set", "pope"), "must be FORMAT=FILE or FORMAT=FILE,IMAGES"),
        (("table", "llava-1.5-7b", "--set", "pope=none"), "none can't be read"),
        (("sweep", "MODEL", "--layers", "8,2"), "such as 2,8, got '8,2'"),
        (("sweep", "MODEL", "--report", "--ratios", "0,0.5"), "--report chooses the ratios"),
        (("unheard-of",), "usage: himap serve"),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, ...], reason: str) -> None:
    assert reason in himap(*arguments, status=2).stderr


def test_no_server(questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "http://127.0.0.1:1/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    for command in (("eval", "--data", str(questions)), ("demo", "--url", url)):
        ended = himap(*command, status=2)
        assert f"{url} does not answer: Connection error" in ended.stderr


def test_sweep_goes_on_where_it_was(world: World, questions: Path, tmp_path: Path) -> None:
    def sweep(criteria: str, *flags: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        return himap(
            "sweep", str(world.checkpoint("mha12")), "--layers", "2,8", "--ratios", "0.5,0.75",
            "--criteria", criteria, "--data", str(questions), "--max-tokens", MAX_TOKENS,
            "--quiet", "--output", str(tmp_path), *flags, "--", "--enforce-eager",
            "--dtype", "float32", "--max-model-len", "512", "--block-size", "32",
            "--kv-cache-memory-bytes", str(64 << 20), status=status,
        )  # fmt: skip

    cells = tmp_path / "cells.jsonl"
    sweep("himap")
    first = cells.read_text()
    assert [next(iter(json.loads(line))) for line in first.splitlines()] == [
        "about", "unpruned", "cell",
    ]  # fmt: skip
    cells.write_text(first + '{"cell": {"engine"')  # stopped while it wrote
    ended = sweep("himap,uniform")
    assert "himap, K = (2, 8) (1 of 2): 0 of 1 settings to do" in ended.stderr
    assert "uniform, K = (2, 8) (2 of 2): 1 of 1 settings to do" in ended.stderr
    assert cells.read_text().startswith(first)
    found: dict[str, Any] = json.loads((tmp_path / "sweep.json").read_text())
    assert found["unpruned"]["accuracy"] == 0.5
    assert [cell["criterion"] for cell in found["cells"]] == ["himap", "uniform"]
    for cell in found["cells"]:
        assert cell["savings"]["kept_deep"] == 5
        assert f"| {cell['criterion']} | 2, 8 |" in (tmp_path / "sweep.md").read_text()
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    ended = sweep("himap", "--limit", "2", status=2)
    assert "is of another model, data set or flags" in ended.stderr


def test_demo(server: Server, tmp_path: Path) -> None:
    """The held-out scenes, put to whatever is served."""
    ended = himap("demo", "--url", f"{server.url}/v1", "--scenes", "2", "--pictures", str(tmp_path))
    assert ended.stdout.count("\nscene ") == 2
    assert len(list(tmp_path.glob("scene-*.png"))) == 2
    lines = {line[:40].strip(): line[40:].split() for line in ended.stdout.splitlines()}
    assert " ".join(lines["image tokens after the cuts"][:8]) == "36, 36 of 36 27, 14 of 36"
    assert lines["image tokens, all layers"][0::2] == ["100", "67", "46", "30"]
    assert "(wrong)" in ended.stdout


def test_without_a_model_the_one_that_ships_is_served() -> None:
    ended = himap("demo", "--scenes", "2")
    assert "himap serve" in ended.stdout
    right = next(line for line in ended.stdout.splitlines() if line.startswith("right answers"))
    assert int(right.split()[2]) >= 2  # of 4, unpruned
