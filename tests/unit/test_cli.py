# SPDX-License-Identifier: Apache-2.0
"""The `himap` command where no engine is needed."""

import subprocess
import sys


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
