# SPDX-License-Identifier: Apache-2.0
"""Data sets, read from the files that their authors publish.

The files and images are the user's; nothing is downloaded. Questions end with the instructions that
LLaVA-1.5 was trained with (https://arxiv.org/abs/2310.03744, section 3.2), where the data set has
none of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .boxes import CONVENTIONS, parse_box
from .items import DataError, Item
from .rows import (
    Entry,
    Raw,
    document,
    json_entries,
    json_lines,
    number,
    objects,
    tab_separated,
    text,
    texts,
)
from .scoring import METRICS

_SHORT = "\nAnswer the question using a single word or phrase."
_LETTER = "\nAnswer with the option's letter from the given choices directly."
_LETTERS = "ABCDEFGH"
_ROTATION = 1_000_000  # MMBench: a question's index plus a multiple of this is a rotation of it
# MMBench's images are files in base64: the first characters tell which kind.
_BASE64_TYPES = {"/9j/": "jpeg", "iVBOR": "png", "UklG": "webp", "R0lG": "gif"}


@dataclass(frozen=True, slots=True)
class Format:
    """How a data set is read.

    Attributes:
        entries: of the user's file or folder.
        items: the questions of one entry, given the folder of the images; may be none.
    """

    entries: Callable[[Path], Iterator[Entry]]
    items: Callable[[Raw, Path], list[Item]]


def _jsonl(raw: Raw, folder: Path) -> list[Item]:
    name = text(raw, "image")
    image = name if name.startswith("data:") else folder / name
    group = text({"group": name, **raw}, "group")
    turns = objects(raw, "turns") if "turns" in raw else [raw]
    items = []
    for turn, own in enumerate(turns):
        fields = {**raw, **own}
        metric = text({"metric": "exact", **fields}, "metric")
        if metric not in METRICS:
            raise ValueError(f"'metric' must be one of {', '.join(METRICS)}, got {metric!r}")
        answers = texts(fields, "answers")
        if metric == "iou" and not all(map(parse_box, answers)):
            raise ValueError("'answers' must be boxes such as '[10, 20, 30, 40]' for iou")
        kind = "all" if len(turns) == 1 else f"question {turn + 1}"
        kind = text({"kind": kind, **fields}, "kind")
        items.append(Item(image, text(fields, "question"), answers, kind, group, metric, turn))
    return items


def _pope_entries(path: Path) -> Iterator[Entry]:
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        for place, raw in json_lines(file):
            yield place, {**raw, "file": file.stem}


def _pope(raw: Raw, folder: Path) -> list[Item]:
    name, kind = text(raw, "image"), raw["file"].rpartition("_")[2]
    question, answers = text(raw, "text") + _SHORT, (text(raw, "label"),)
    return [Item(folder / name, question, answers, kind, name, "yes_no")]


def _scienceqa_entries(path: Path) -> Iterator[Entry]:
    folder = path if path.is_dir() else path.parent
    problems = document(folder / "problems.json")
    for name in document(folder / "pid_splits.json")["test"]:
        yield f"{folder / 'problems.json'}, entry {name}", {**problems[name], "id": name}


def _scienceqa(raw: Raw, folder: Path) -> list[Item]:
    if not raw["image"]:
        return []
    name, file = text(raw, "id"), text(raw, "image")
    image = _existing(folder / "test" / name / file, folder / name / file)
    options = texts(raw, "choices")
    question = _choices([raw.get("hint"), text(raw, "question")], options)
    right = number(raw, "answer")
    if right >= len(options):
        raise ValueError(f"'answer' must be the number of a choice, counted from 0, got {right}")
    return [Item(image, question, (_LETTERS[right],), text(raw, "subject"), name, "choice")]


def _textvqa(raw: Raw, folder: Path) -> list[Item]:
    name, question = text(raw, "image_id"), text(raw, "question") + _SHORT
    image = folder / f"{name}.jpg"
    return [Item(image, question, texts(raw, "answers"), "textvqa", name, "vqa")]


def _vqav2_entries(path: Path) -> Iterator[Entry]:
    name = path.name.replace("OpenEnded_", "").replace("_questions", "_annotations")
    annotations = json_entries(path.with_name(name), "annotations")
    answers = {raw["question_id"]: raw for _, raw in annotations}
    for place, raw in json_entries(path, "questions"):
        yield place, {**answers[raw["question_id"]], **raw}


def _vqav2(raw: Raw, folder: Path) -> list[Item]:
    name = f"COCO_val2014_{number(raw, 'image_id'):012d}.jpg"
    answers = tuple(text(own, "answer") for own in objects(raw, "answers"))
    question, kind = text(raw, "question") + _SHORT, text(raw, "answer_type")
    return [Item(folder / name, question, answers, kind, name, "vqa")]


def _gqa(raw: Raw, folder: Path) -> list[Item]:
    name, question = text(raw, "imageId"), text(raw, "question") + _SHORT
    return [Item(folder / f"{name}.jpg", question, (text(raw, "answer"),), "gqa", name)]


def _docvqa(raw: Raw, folder: Path) -> list[Item]:
    name, question = text(raw, "image"), text(raw, "question") + _SHORT
    kind = texts({"question_types": "docvqa", **raw}, "question_types")[0]
    return [Item(folder / name, question, texts(raw, "answers"), kind, name, "anls")]


def _ocrbench(raw: Raw, folder: Path) -> list[Item]:
    name, kind = text(raw, "image_path"), text(raw, "type")
    formula = text(raw, "dataset_name") == "HME100k"
    metric = "contains_formula" if formula else "contains"
    return [Item(folder / name, text(raw, "question"), texts(raw, "answers"), kind, name, metric)]


def _refcoco(raw: Raw, folder: Path, convention: str) -> list[Item]:
    name = text(raw, "image")
    image = _existing(folder / name, folder / Path(name).name)
    box = parse_box(str(raw.get("bbox")))
    if box is None:
        raise ValueError("'bbox' must be a box such as [10, 20, 30, 40], in pixels")
    rule = CONVENTIONS[convention]
    converted = rule.convert(box, number(raw, "width"), number(raw, "height"))
    answer = ", ".join(f"{side:.4f}" for side in converted)
    question = rule.question.format(text(raw, "sent"))
    return [Item(image, question, (answer,), "refcoco", name, "iou")]


def _mmbench_entries(path: Path) -> Iterator[Entry]:
    """An image is in base64, or is the index of an earlier row that has it."""
    images: dict[str, str] = {}
    for place, raw in tab_separated(path):
        image = raw.get("image", "")
        if image in images:
            image = images[image]
        else:
            kind = next((own for head, own in _BASE64_TYPES.items() if image.startswith(head)), "")
            image = f"data:image/{kind};base64,{image}" if kind else ""
        images[raw.get("index", "")] = image
        yield place, {**raw, "image": image}


def _mmbench(raw: Raw, _folder: Path, circular: bool) -> list[Item]:
    rotation, index = divmod(number(raw, "index"), _ROTATION)
    if rotation and not circular:
        return []
    if not raw["image"]:
        raise ValueError("'image' must be a JPEG, PNG, WebP or GIF file in base64")
    options = [raw[letter] for letter in _LETTERS if raw.get(letter, "nan") != "nan"]
    hint = raw.get("hint", "nan")
    question = _choices([None if hint == "nan" else hint, text(raw, "question")], options)
    return [
        Item(
            image=raw["image"],
            question=question,
            answers=(text(raw, "answer"),),
            kind=text({"category": "mmbench", **raw}, "category"),
            group=str(index),
            metric="choice",
            together=str(index) if circular else "",
        )
    ]


def _mme_entries(path: Path) -> Iterator[Entry]:
    for file in sorted(path.rglob("*.txt")):
        category = file.parent.parent if file.parent.name == "questions_answers_YN" else file.parent
        found = [
            image
            for place in (file.parent, category / "images")
            for suffix in (".jpg", ".png", ".jpeg")
            if (image := place / f"{file.stem}{suffix}").is_file()
        ]
        if not found:
            raise DataError(f"{file} has no image")
        for line, words in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if words.strip():
                question, tab, answer = words.rpartition("\t")
                if not tab:
                    raise DataError(f"{file}:{line}: must be a question, a tab and an answer")
                name = str(found[0].relative_to(path))
                yield f"{file}:{line}", {
                    "question": question, "answer": answer.strip(), "image": name,
                    "category": category.name,
                }  # fmt: skip


def _mme(raw: Raw, folder: Path) -> list[Item]:
    name, answers = raw["image"], (raw["answer"],)
    return [Item(folder / name, raw["question"], answers, raw["category"], name, "yes_no")]


def _choices(above: Sequence[str | None], options: Sequence[str]) -> str:
    letters = [f"{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=False)]
    return "\n".join([part for part in above if part] + letters) + _LETTER


def _existing(*places: Path) -> Path:
    return next((place for place in places if place.exists()), places[0])


FORMATS: dict[str, Format] = {
    "jsonl": Format(json_lines, _jsonl),
    "pope": Format(_pope_entries, _pope),
    "scienceqa": Format(_scienceqa_entries, _scienceqa),
    "textvqa": Format(partial(json_entries, key="data"), _textvqa),
    "vqav2": Format(_vqav2_entries, _vqav2),
    "gqa": Format(json_entries, _gqa),
    "mme": Format(_mme_entries, _mme),
    "mmbench": Format(_mmbench_entries, partial(_mmbench, circular=False)),
    "mmbench-circular": Format(_mmbench_entries, partial(_mmbench, circular=True)),
    "docvqa": Format(partial(json_entries, key="data"), _docvqa),
    "ocrbench": Format(json_entries, _ocrbench),
    **{
        f"refcoco-{name}": Format(json_lines, partial(_refcoco, convention=name))
        for name in CONVENTIONS
    },
}


def read(data_format: str, path: Path, images: Path | None) -> list[Item]:
    """All items of a data set.

    Args:
        data_format: a name in `FORMATS`.
        path: its file or folder.
        images: folder of its images; None: the folder of the file.

    Raises:
        DataError: a file is missing, or not in that format.
    """
    if data_format == "mme" and images is not None:
        raise DataError("MME's images lie beside its questions; --images is not used")
    folder = images or (path if path.is_dir() else path.parent)
    items: list[Item] = []
    place = str(path)
    try:
        for place, raw in FORMATS[data_format].entries(path):
            items += FORMATS[data_format].items(raw, folder)
            place = str(path)
    except (OSError, ValueError, LookupError, ArithmeticError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{place}: not {data_format} data: {reason}") from error
    if not items:
        raise DataError(f"{path} has no questions")
    return items
