# SPDX-License-Identifier: Apache-2.0
"""The bundled model: what `himap serve` serves without a MODEL."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SETTINGS = "himap.json"


@dataclass(frozen=True, slots=True)
class BundledModel:
    """The bundled checkpoint and the engine settings recommended for it.

    Attributes:
        path: folder of the checkpoint.
        name: the name under which it is served.
        engine: keys of `additional_config["himap"]`.
    """

    path: Path
    name: str
    engine: dict[str, Any]


def bundled_model() -> BundledModel:
    """The model of `himap_demo`, with the settings of its `himap.json`.

    Without that file the engine's defaults apply.

    Raises:
        ImportError: `himap_demo` is not installed.
    """
    try:
        from himap_demo import MODEL_PATH
    except ImportError as error:
        raise ImportError(f"name a MODEL: the bundled model is not installed ({error})") from error
    path = Path(MODEL_PATH)
    file = path / _SETTINGS
    settings = json.loads(file.read_text()) if file.exists() else {}
    return BundledModel(path, "himap-demo", settings)


def is_bundled(model: str) -> bool:
    """Whether the engine's `model` is the bundled one."""
    try:
        return model == str(bundled_model().path)
    except ImportError:
        return False
