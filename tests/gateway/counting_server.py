# SPDX-License-Identifier: Apache-2.0
"""The `himap` command in a process that counts how often it decodes images.

`python -m tests.gateway.counting_server serve ...` appends a line to the file that
HIMAP_TEST_DECODES names for every image whose pixels are decoded, and for every base64 text that is
decoded or made.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pybase64
from PIL.ImageFile import ImageFile


def _count(owner: Any, name: str, line: str) -> None:
    inner = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        with open(os.environ["HIMAP_TEST_DECODES"], "a") as file:
            file.write(f"{line}\n")
        return inner(*args, **kwargs)

    setattr(owner, name, counted)


def main() -> int:
    # Pillow calls it only before it decodes, not for an image that is loaded already.
    _count(ImageFile, "load_prepare", "pixels")
    for name in ("b64decode", "b64decode_as_bytearray", "standard_b64decode"):
        _count(pybase64, name, "base64 decoded")
    for name in ("b64encode", "b64encode_as_string"):
        _count(pybase64, name, "base64 made")

    from himap_server.cli import main as himap

    return himap(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
