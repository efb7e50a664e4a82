# SPDX-License-Identifier: Apache-2.0
"""Small files in the layout of each public data set, as their authors publish them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.checkpoints import sample_images

WIDTH, HEIGHT = sample_images(1)[0].size


def picture(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sample_images(1, seed=seed)[0].save(path)


def _lines(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def _document(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def _jsonl(folder: Path) -> Path:
    picture(folder / "a.png")
    turns = [{"question": "What is this?", "answers": ["a dog", "dog"]},
             {"question": "And its color?", "answers": "brown"}]  # fmt: skip
    single = {"image": "a.png", "question": "How many?", "answers": "2"}
    return _lines(folder / "questions.jsonl", {"image": "a.png", "turns": turns}, single)


def _pope(folder: Path) -> Path:
    name = "COCO_val2014_000000310196.jpg"
    picture(folder / name)
    asked = ("a snowboard", "a dog", "a backpack")
    return _lines(folder / "coco_pope_random.json", *(
        {"question_id": number, "image": name, "text": f"Is there {thing} in the image?",
         "label": "yes"}
        for number, thing in enumerate(asked)
    ))  # fmt: skip


def _scienceqa(folder: Path) -> Path:
    problem = {"question": "Which is north?", "choices": ["Maine", "Ohio"], "answer": 1,
               "hint": "Look at the map.", "image": "image.png", "subject": "social science",
               "split": "test"}  # fmt: skip
    for name in "13":
        picture(folder / "test" / name / "image.png")
    _document(folder / "pid_splits.json", {"test": ["1", "2", "3"]})
    problems = {"1": problem, "2": {**problem, "image": None}, "3": problem}
    return _document(folder / "problems.json", problems)


def _textvqa(folder: Path) -> Path:
    picture(folder / "003a8ae2ef43b901.jpg")
    entry = {"question_id": 34602, "question": "what is the brand of this camera?",
             "image_id": "003a8ae2ef43b901", "answers": ["dakota"] * 10}  # fmt: skip
    return _document(folder / "TextVQA_0.5.1_val.json", {"data": [entry] * 3})


def _vqav2(folder: Path) -> Path:
    picture(folder / "COCO_val2014_000000262148.jpg")
    questions = [{"image_id": 262148, "question": f"Where is {who} looking?", "question_id": number}
                 for number, who in enumerate(("he", "she", "it"))]  # fmt: skip
    answers = [{"answer": "down", "answer_id": number} for number in range(1, 11)]
    annotations = [{"question_id": number, "image_id": 262148, "answer_type": "other",
                    "answers": answers} for number in (2, 1, 0)]  # fmt: skip
    _document(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    file = folder / "v2_OpenEnded_mscoco_val2014_questions.json"
    return _document(file, {"questions": questions})


def _gqa(folder: Path) -> Path:
    picture(folder / "n161313.jpg")
    entry = {"imageId": "n161313", "question": "Is it overcast?", "answer": "no"}
    file = folder / "testdev_balanced_questions.json"
    return _document(file, {"201307251": entry, "201640614": {**entry, "question": "Who is it?"}})


def _mme(folder: Path) -> Path:
    text = (
        "Is there a dog? Please answer yes or no.\tYes\nIs it red? Please answer yes or no.\tNo\n"
    )
    picture(folder / "existence" / "1.jpg")
    (folder / "existence" / "1.txt").write_text(text)
    picture(folder / "posters" / "images" / "2.png")
    (folder / "posters" / "questions_answers_YN").mkdir()
    (folder / "posters" / "questions_answers_YN" / "2.txt").write_text(text)
    return folder


MMBENCH_COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image")


def _mmbench(folder: Path) -> Path:
    """A question with two options and its rotation, and one with four that shares the image."""
    buffer = io.BytesIO()
    sample_images(1)[0].save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    north = ("Which is north?", "The map\nis old.")
    rows = [
        MMBENCH_COLUMNS,
        ("241", *north, "Maine", "Ohio", "", "", "A", "map", image),
        ("1000241", *north, "Ohio", "Maine", "", "", "B", "map", "241"),
        ("252", "How many?", "nan", "1", "2", "3", "4", "C", "count", "241"),
    ]  # fmt: skip
    file = folder / "MMBench_DEV_EN.tsv"
    cells = (['"' + cell + '"' if "\n" in cell else cell for cell in row] for row in rows)
    file.write_text("".join("\t".join(row) + "\n" for row in cells))
    return file


def _docvqa(folder: Path) -> Path:
    entry = {"questionId": 49153, "question": "What is the actual value per 1000?",
             "question_types": ["figure/diagram"], "image": "documents/pybv0228_81.png",
             "docId": 14465, "answers": ["0.28", ".28"], "data_split": "val"}  # fmt: skip
    picture(folder / "documents" / "pybv0228_81.png")
    return _document(folder / "val_v1.0_withQT.json", {"data": [entry] * 3})


def _ocrbench(folder: Path) -> Path:
    word = {"dataset_name": "IIIT5K", "type": "Regular Text Recognition", "id": 0,
            "image_path": "IIIT5K/1.png", "question": "what is written in the image?",
            "answers": ["CENTRE"]}  # fmt: skip
    formula = {**word, "dataset_name": "HME100k", "answers": "x ^ { 2 }",
               "type": "Handwritten Mathematical Expression Recognition"}  # fmt: skip
    picture(folder / "IIIT5K" / "1.png")
    return _document(folder / "OCRBench.json", [word, formula, word])


def _refcoco(folder: Path) -> Path:
    picture(folder / "COCO_train2014_000000581857.jpg")
    entry = {"image": "data/coco/train2014/COCO_train2014_000000581857.jpg",
             "sent": "the lady with the blue shirt", "bbox": [10.0, 20.0, 30.0, 50.0],
             "width": WIDTH, "height": HEIGHT}  # fmt: skip
    return _lines(folder / "refcoco_val.jsonl", entry, entry, entry)


WRITERS: dict[str, Callable[[Path], Path]] = {
    "jsonl": _jsonl,
    "pope": _pope,
    "scienceqa": _scienceqa,
    "textvqa": _textvqa,
    "vqav2": _vqav2,
    "gqa": _gqa,
    "mme": _mme,
    "mmbench": _mmbench,
    "mmbench-circular": _mmbench,
    "docvqa": _docvqa,
    "ocrbench": _ocrbench,
    "refcoco-pixels": _refcoco,
    "refcoco-1000": _refcoco,
    "refcoco-unit": _refcoco,
    "refcoco-square": _refcoco,
}
"""Format -> a function that writes its file to a folder, images beside it, and returns its path."""
