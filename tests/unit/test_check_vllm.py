# SPDX-License-Identifier: Apache-2.0
"""A release of vLLM that is not as it was read is found, by its sources alone."""

from importlib.metadata import version
from pathlib import Path

import pytest

from himap_vllm.vllm_versions import MOVED
from scripts.check_vllm import check, load_known, lost, record, register
from scripts.vllm_sources import Sources, installed

SCHEDULER = """
class Base:
    def schedule(self, step: int) -> int:
        '''Text.'''
        return step + 1

class Scheduler(Base):
    def __init__(self):
        self.running = []

    def run(self):
        return self.schedule(1)
"""
PRODUCT = '''"""Text.

* `vllm.v1.scheduler.Scheduler.schedule` (overridden): steps. Remove when: never.
* `vllm.v1.scheduler.Scheduler.running` (read): requests. Remove when: never.
"""

from vllm.v1 import Scheduler
'''


def release(folder: Path, scheduler: str = SCHEDULER) -> Sources:
    """A vLLM with one class, exported by a package."""
    package = folder / "vllm" / "v1"
    package.mkdir(parents=True)
    (folder / "vllm" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("from .scheduler import Scheduler\n")
    (package / "scheduler.py").write_text(scheduler)
    return Sources(folder)


@pytest.fixture
def product(tmp_path: Path) -> Path:
    """A project that relies on it."""
    folder = tmp_path / "product" / "himap_vllm"
    folder.mkdir(parents=True)
    (folder / "core.py").write_text(PRODUCT)
    return folder.parent


def lines(product: Path, tmp_path: Path, old: str, new: str) -> list[str]:
    """What the check says of a release in which `old` became `new`."""
    known = record(release(tmp_path / "known"), register(product))
    assert old in SCHEDULER
    return check(release(tmp_path / "next", SCHEDULER.replace(old, new)), known, product)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("Text.", "Another text.", []),
        ("return step + 1", "# why\n        return step + 1", []),
        ("return step + 1", "return step + 2", ["BODY schedule"]),
        ("step: int)", "step: int, more: int)", ["SIGNATURE schedule"]),
        ("def run(self)", "def step(self)", ["CALLERS schedule"]),
        ("def schedule(", "def plan(", ["MISSING schedule"]),
        ("self.running", "self.live", ["MISSING running"]),
        ("class Scheduler(Base)", "class Core(Base)",
         ["IMPORT Scheduler", "MISSING running", "MISSING schedule"]),
    ],
)  # fmt: skip
def test_a_seam_broken_on_purpose_is_found(
    product: Path, tmp_path: Path, old: str, new: str, found: list[str]
) -> None:
    said = [line.split() for line in lines(product, tmp_path, old, new)]
    assert sorted(f"{kind} {name.rpartition('.')[2]}" for kind, name, *_ in said) == found


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ("schedule(self, step)", None),
        ("schedule(self, *args, **kwargs)", None),
        ("schedule(self, step, more=None)", None),
        ("schedule(self, step, more)", "ours needs 'more'"),
        ("schedule(self, step, *, more)", "ours needs 'more'"),
        ("schedule(self)", "ours does not take 'step' as argument 1"),
        ("schedule(self, *args)", "ours does not take 'step' as argument 1"),
        ("schedule(self, more, step)", "ours does not take 'step' as argument 1"),
        ("plan(self, step)", "is not there"),
        ("run(self)", "ours does not take the keyword 'twice'"),
        ("run(self, **kwargs)", None),
        ("anything(self, *args, **kwargs)", None),
        ("anything(self, **kwargs)", "ours does not take *more"),
        ("anything(self, *args)", "ours does not take **most"),
    ],
)
def test_an_override_that_vllm_cannot_call_is_found(
    product: Path, tmp_path: Path, ours: str, said: str | None
) -> None:
    (product / "himap_vllm" / "core.py").write_text(
        "if TYPE_CHECKING:\n    from vllm.v1 import Scheduler as Base\n"
        f"class Mine(Base):\n    @override\n    def {ours}: ...\n"
    )
    scheduler = SCHEDULER.replace("run(self)", "run(self, *, twice)")
    scheduler += "    def anything(self, *more, **most): ...\n"
    lines = check(release(tmp_path / "next", scheduler), {}, product)
    assert [line.split("\n    ")[1] for line in lines] == ([] if said is None else [said])


@pytest.mark.parametrize(
    ("ours", "said"),
    [("schedule(self)", ["does not take 'step' as argument 1"]), ("schedule(self, step)", []),
     ("other(self)", [])],
)  # fmt: skip
def test_an_override_of_a_base_chosen_at_run_time_is_checked(
    product: Path, tmp_path: Path, ours: str, said: list[str]
) -> None:
    (product / "himap_vllm" / "core.py").write_text(
        f"{PRODUCT}def make(base):\n    class Mine(base):\n        @override\n"
        f"        def {ours}: ...\n"
    )
    sources = release(tmp_path / "next")
    found = [line for line in check(sources, {}, product) if line.startswith("OVERRIDE")]
    assert [line.split("ours ")[1] for line in found] == said


def test_a_symbol_that_nobody_has_read_is_found(product: Path, tmp_path: Path) -> None:
    (line, _) = check(release(tmp_path / "known"), {}, product)
    assert line.startswith("UNREAD")


def test_a_name_that_has_moved_to_an_unknown_place_is_found(tmp_path: Path) -> None:
    *found, gone = sorted(MOVED)
    for name in found:
        module = MOVED[name][-1].split(".")
        file = tmp_path.joinpath(*module).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as text:
            text.write(f"{name} = None\n")
    (line,) = lost(Sources(tmp_path))
    assert gone in line


def test_the_installed_vllm_is_as_it_was_read() -> None:
    """The CPU build has the sources of the release it is made from."""
    assert check(installed(), load_known()[version("vllm").split("+")[0]]) == []
