# SPDX-License-Identifier: Apache-2.0
"""Files of public data sets, as `himap eval` reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from himap_eval.boxes import CONVENTIONS, Box, overlap, parse_box
from himap_eval.formats import FORMATS, read
from himap_eval.items import DataError, Item, check_images

from tests.data_files import HEIGHT, WIDTH, WRITERS, picture

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
MAP = f"The map\nis old.\nWhich is north?\nA. Maine\nB. Ohio{LETTER}"

# Of the first question: text, accepted answers, kind, group, metric; and how many there are.
FIRST: dict[str, tuple[str, tuple[str, ...], str, str, str, int]] = {
    "jsonl": ("What is this?", ("a dog", "dog"), "question 1", "a.png", "exact", 3),
    "pope": (
        f"Is there a snowboard in the image?{SHORT}",
        ("yes",), "random", "COCO_val2014_000000310196.jpg", "yes_no", 3,
    ),
    "scienceqa": (
        f"Look at the map.\nWhich is north?\nA. Maine\nB. Ohio{LETTER}",
        ("B",), "social science", "1", "choice", 2,
    ),
    "textvqa": (
        f"what is the brand of this camera?{SHORT}",
        ("dakota",) * 10, "textvqa", "003a8ae2ef43b901", "vqa", 3,
    ),
    "vqav2": (
        f"Where is he looking?{SHORT}",
        ("down",) * 10, "other", "COCO_val2014_000000262148.jpg", "vqa", 3,
    ),
    "gqa": (f"Is it overcast?{SHORT}", ("no",), "gqa", "n161313", "exact", 2),
    "mme": (
        "Is there a dog? Please answer yes or no.",
        ("Yes",), "existence", "existence/1.jpg", "yes_no", 4,
    ),
    "mmbench": (MAP, ("A",), "map", "241", "choice", 2),
    "mmbench-circular": (MAP, ("A",), "map", "241", "choice", 3),
    "docvqa": (
        f"What is the actual value per 1000?{SHORT}",
        ("0.28", ".28"), "figure/diagram", "documents/pybv0228_81.png", "anls", 3,
    ),
    "ocrbench": (
        "what is written in the image?",
        ("CENTRE",), "Regular Text Recognition", "IIIT5K/1.png", "contains", 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("data_format", FORMATS)
def test_every_format(tmp_path: Path, data_format: str) -> None:
    items = read(data_format, WRITERS[data_format](tmp_path), None)
    check_images(items)
    assert items[0].image_url().startswith("data:image/")
    if data_format in FIRST:
        question, answers, kind, group, metric, count = FIRST[data_format]
        first = items[0]
        assert (first.question, first.answers) == (question, answers)
        assert (first.kind, first.group, first.metric) == (kind, group, metric)
        assert len(items) == count
    else:
        assert data_format.startswith("refcoco-")


def test_jsonl(tmp_path: Path) -> None:
    lines = [
        {"image": "a.png", "question": "What?", "answers": "this"},
        {"image": "data:image/png;base64,AA==", "question": "How many?", "answers": ["2", "two"],
         "kind": "count", "group": "g", "metric": "vqa"},
    ]  # fmt: skip
    file = tmp_path / "questions.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines)))
    picture(tmp_path / "a.png")
    first, second = read("jsonl", file, None)
    assert first == Item(tmp_path / "a.png", "What?", ("this",), "all", "a.png")
    assert first.image_url().startswith("data:image/png;base64,iVBOR")
    assert second == Item(
        "data:image/png;base64,AA==", "How many?", ("2", "two"), "count", "g", "vqa"
    )


def test_turns_of_jsonl(tmp_path: Path) -> None:
    first, second, single = read("jsonl", WRITERS["jsonl"](tmp_path), None)
    assert (first.turn, second.turn, single.turn) == (0, 1, 0)
    assert (second.question, second.kind) == ("And its color?", "question 2")
    assert single.kind == "all"


GOOD = '{"image": "a.png", "question": "?", "answers": "x"}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting"),
        ("[]", "must be an object"),
        ('{"image": "a.png", "answers": "x"}', "'question' is missing"),
        ('{"image": "a.png", "question": "?", "answers": []}', "'answers' .*at least one"),
        ('{"image": "a.png", "question": "?", "answers": [1]}', "'answers' .*at least one"),
        ('{"image": 1.5, "question": "?", "answers": "x"}', "'image' must be a string, got 1.5"),
        ('{"image": "a.png", "question": "?", "answers": "x", "metric": "best"}', "one of exact"),
        ('{"image": "a.png", "question": "?", "answers": "x", "metric": "iou"}', "must be boxes"),
        ('{"image": "a.png", "turns": ["?"]}', "'turns' must be a list of at least one object"),
        ('{"image": "a.png", "turns": [{"answers": "x"}]}', "'question' is missing"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(DataError, match=f"questions.jsonl:2: .*{reason}"):
        read("jsonl", file, None)


def spoiled(value: Any, name: str, new: Any) -> Any:
    """A copy of a document in which the last field with that name is another, or gone."""
    text = json.dumps(value)
    before, _, after = text.rpartition(f'"{name}": ')
    _, end = json.JSONDecoder().raw_decode(after)
    if new is None:
        return before + f'"was {name}": ' + after
    return before + f'"{name}": ' + json.dumps(new) + after[end:]


@pytest.mark.parametrize(
    ("data_format", "field", "new", "message"),
    [
        ("pope", "label", None, "coco_pope_random.json:3: .*'label' is missing"),
        ("scienceqa", "choices", "one", "entry 3: .*'answer' must be the number of a choice"),
        ("scienceqa", "subject", None, "problems.json, entry 3: .*'subject' is missing"),
        ("textvqa", "answers", [], "TextVQA_0.5.1_val.json, entry 3: .*'answers' must be"),
        ("vqav2", "question", 1.5, "questions.json, entry 3: .*'question' must be a string"),
        ("gqa", "imageId", None, "entry 201640614: .*'imageId' is missing"),
        ("docvqa", "image", [1], "val_v1.0_withQT.json, entry 3: .*'image' must be a string"),
        ("ocrbench", "answers", {}, "OCRBench.json, entry 3: .*'answers' must be"),
        ("refcoco-pixels", "bbox", [1, 2, 3], "refcoco_val.jsonl:3: .*'bbox' must be a box"),
        ("refcoco-unit", "width", "wide", "refcoco_val.jsonl:3: .*'width' must be a whole number"),
        ("refcoco-1000", "width", 0, "refcoco_val.jsonl:3: .*division by zero"),
    ],
)
def test_a_bad_entry_is_named(
    tmp_path: Path, data_format: str, field: str, new: Any, message: str
) -> None:
    file = WRITERS[data_format](tmp_path)
    text = file.read_text()
    if file.suffix == ".jsonl" or data_format == "pope":
        *good, last = text.splitlines()
        file.write_text("\n".join([*good, spoiled(json.loads(last), field, new)]))
    else:
        file.write_text(spoiled(json.loads(text), field, new))
    with pytest.raises(DataError, match=message):
        read(data_format, file, None)


@pytest.mark.parametrize("data_format", FORMATS)
def test_other_files_are_refused(tmp_path: Path, data_format: str) -> None:
    file = tmp_path / "file.json"
    file.write_text('{"data": [{}]}')
    with pytest.raises(DataError, match=r"file\.json|problems\.json|has no questions"):
        read(data_format, file, None)
    with pytest.raises(DataError):
        read(data_format, tmp_path / "none", None)


def test_scienceqa_without_images(tmp_path: Path) -> None:
    """Images may lie in another folder, with or without `test`; questions without one are left."""
    file = WRITERS["scienceqa"](tmp_path)
    (tmp_path / "test").rename(tmp_path / "images")
    first, second = read("scienceqa", file, tmp_path / "images")
    assert (first.group, second.group) == ("1", "3")
    assert first.image == tmp_path / "images" / "1" / "image.png"


def test_pope_in_a_folder(tmp_path: Path) -> None:
    text = WRITERS["pope"](tmp_path).read_text()
    (tmp_path / "coco_pope_adversarial.json").write_text(text)
    items = read("pope", tmp_path, tmp_path / "val2014")
    assert [item.kind for item in items] == ["adversarial"] * 3 + ["random"] * 3
    assert items[0].image == tmp_path / "val2014" / "COCO_val2014_000000310196.jpg"


def test_mme_has_its_images_beside_the_questions(tmp_path: Path) -> None:
    items = read("mme", WRITERS["mme"](tmp_path), None)
    assert [item.kind for item in items] == ["existence"] * 2 + ["posters"] * 2
    assert [item.answers for item in items] == [("Yes",), ("No",)] * 2
    assert items[3].image == tmp_path / "posters" / "images" / "2.png"
    assert items[0].group == items[1].group != items[2].group
    with pytest.raises(DataError, match="--images is not used"):
        read("mme", tmp_path, tmp_path)
    text = tmp_path / "existence" / "1.txt"
    text.write_text(text.read_text() + "Is it blue? Yes")
    with pytest.raises(DataError, match=r"1\.txt:3: must be a question, a tab and an answer"):
        read("mme", tmp_path, None)
    (tmp_path / "existence" / "1.jpg").unlink()
    with pytest.raises(DataError, match=r"1\.txt has no image"):
        read("mme", tmp_path, None)


def test_mmbench_and_its_rotations(tmp_path: Path) -> None:
    file = WRITERS["mmbench"](tmp_path)
    once, count = read("mmbench", file, None)
    assert (once.together, count.together) == ("", "")
    assert count.question == f"How many?\nA. 1\nB. 2\nC. 3\nD. 4{LETTER}"
    assert count.image == once.image
    first, rotated, other = read("mmbench-circular", file, None)
    assert (first.together, rotated.together, other.together) == ("241", "241", "252")
    assert (first.answers, rotated.answers) == (("A",), ("B",))
    assert rotated.group == first.group
    lines = file.read_text().split("\n")
    for line, message in (
        ("x\twhy", r"MMBench_DEV_EN\.tsv:7: .*'index' must be a whole number"),
        ("3\twhy" + "\t" * 7 + "x", r"MMBench_DEV_EN\.tsv:7: .*'image' must be a JPEG"),
        ("3\twhy" + "\t" * 7 + "x\t241", r"MMBench_DEV_EN\.tsv:7: .*'answer' is missing"),
        ("3\twhy" + "\t" * 20, r"MMBench_DEV_EN\.tsv:7: more cells than columns"),
    ):
        file.write_text("\n".join([*lines[:-1], line]))
        with pytest.raises(DataError, match=message):
            read("mmbench", file, None)


def test_formulas_of_ocrbench(tmp_path: Path) -> None:
    items = read("ocrbench", WRITERS["ocrbench"](tmp_path), None)
    assert [item.metric for item in items] == ["contains", "contains_formula", "contains"]


@pytest.mark.parametrize(
    ("convention", "size", "box"),
    [
        # 640 x 427 becomes 644 x 420: the nearest multiples of 28.
        ("pixels", (640, 427), (64 * 644 / 640, 0, 320 * 644 / 640, 420)),
        ("1000", (640, 427), (100, 0, 500, 1000)),
        ("unit", (640, 427), (0.1, 0, 0.5, 1)),
        # 106 rows of padding above and 107 below.
        ("square", (640, 427), (0.1, 106 / 640, 0.5, 533 / 640)),
        ("square", (427, 640), ((64 + 106) / 640, 0, (320 + 106) / 640, 427 / 640)),
    ],
)
def test_coordinates(convention: str, size: tuple[int, int], box: Box) -> None:
    found = CONVENTIONS[convention].convert((64, 0, 320, 427), *size)
    assert found == pytest.approx(box)


def test_refcoco(tmp_path: Path) -> None:
    items = read("refcoco-1000", WRITERS["refcoco-1000"](tmp_path), None)
    assert items[0].question.endswith(": the lady with the blue shirt")
    (answer,) = items[0].answers
    wanted = (10 * 1000 / WIDTH, 20 * 1000 / HEIGHT, 30 * 1000 / WIDTH, 50 * 1000 / HEIGHT)
    assert parse_box(answer) == pytest.approx(wanted)
    assert overlap(wanted, wanted) == 1
    unit = read("refcoco-unit", tmp_path / "refcoco_val.jsonl", None)[0].answers[0]
    assert parse_box(unit) == pytest.approx([side / 1000 for side in wanted], abs=1e-4)
