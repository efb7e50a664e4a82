# SPDX-License-Identifier: Apache-2.0
"""The register of seams: fresh, in one form, and of symbols that the installed vLLM has."""

import pytest

from scripts.seams import REGISTER, SeamNoteError, read_seams, render, seams_of
from scripts.vllm_sources import installed


def test_register_is_fresh() -> None:
    assert REGISTER.read_text() == render(read_seams()), "run python -m scripts.seams"


@pytest.mark.parametrize(
    "note",
    [
        "`vllm.a.B.c` (overridden): no end.",
        "`vllm.a.B.c` (patched): why. Remove when: x.",
        "B.c: why. Remove when: x.",
        "`vllm.a.B.c` (called): why. Can go when vLLM has it.",
        "vLLM seam: B.c.",
        "`vllm.a.b` (read): why. Remove when: x. `vllm.a.c` (read): why. Remove when: y.",
    ],
)
def test_a_note_in_another_form_is_found(note: str) -> None:
    with pytest.raises(SeamNoteError):
        list(seams_of(f'"""Module.\n\n* {note}\n"""\n', "file.py"))


def test_notes_are_found_in_docstrings_and_comments() -> None:
    source = '''def f():
    """Text.

    * `vllm.a.b`, `vllm.a.c` (called): a reason that goes
      on. Remove when: it is
      there.
    * `vllm.d` (read): why. Remove when: never.
    """
    # `vllm.e` (called), `vllm.f` (wrapped): why, over
    # two lines. Remove when: x.
    return 1
'''
    found = list(seams_of(source, "file.py"))
    assert [seam.symbols for seam in found] == [
        ("vllm.a.b", "vllm.a.c"),
        ("vllm.d",),
        ("vllm.e", "vllm.f"),
    ]
    assert [seam.how for seam in found] == ["called", "read", "called, wrapped"]
    assert found[0].why == "a reason that goes on."
    assert [seam.remove_when for seam in found] == ["it is there", "never", "x"]


INSTALLED = installed()


def test_symbols_exist_in_the_installed_vllm() -> None:
    names = {name for seam in read_seams() for name in seam.symbols if name.startswith("vllm.")}
    assert not [name for name in sorted(names) if INSTALLED.resolve(name) is None]


@pytest.mark.parametrize(
    "name",
    [
        "vllm.nothing",
        "vllm.v1.core.sched.scheduler.Scheduler.nothing",
        "vllm.v1.core.sched.scheduler.Nothing",
        "vllm.v1.core.sched.async_scheduler.AsyncScheduler.nothing",
    ],
)
def test_symbols_that_are_gone_are_found(name: str) -> None:
    assert INSTALLED.resolve(name) is None
