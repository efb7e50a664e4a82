# SPDX-License-Identifier: Apache-2.0
"""The `himap` command where no engine is needed."""

import os
import subprocess
import sys

import pytest
from himap_server import preflight
from himap_server.serve import parse_arguments


def test_a_key_is_made_without_loading_vllm() -> None:
    """It takes seconds, and more in a container with a share of a core."""
    code = """if True:
        import sys
        from himap_server.cli import main
        main(["key", "team-a"])
        assert not {"torch", "vllm"} & set(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "below `keys:`" in done.stdout


def test_a_file_that_is_a_pipe_is_left_to_the_server() -> None:
    """Read before, its settings would be lost, API keys among them."""
    for flag in ("--config", "--api-keys-file"):
        out, into = os.pipe()
        os.write(into, b"api-keys-file: keys.yaml")
        os.close(into)
        preflight.check([flag, f"/dev/fd/{out}"])
        assert os.read(out, 100) == b"api-keys-file: keys.yaml"
        os.close(out)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("VLLM_ENABLE_RESPONSES_API_STORE", "himap serve stores no responses"),
        ("VLLM_SERVER_DEV_MODE", "himap serve has none of its routes"),
        ("VLLM_API_KEY", "use --api-keys-file"),
    ],
)
def test_variables_of_vllm_are_refused_with_a_reason(
    name: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(SystemExit):
        parse_arguments(["model"])
    assert f"{name} is not supported: {reason}" in capsys.readouterr().err
