# SPDX-License-Identifier: Apache-2.0
"""Routes of the playground, and whether there are any."""

from __future__ import annotations

import io
import ipaddress
import random
from argparse import Namespace
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from himap_vllm.config import ADDITIONAL_CONFIG_KEY, EngineSettings

from ..errors import GatewayError, Reason
from ..settings import GatewaySettings

PATH = "/playground"
_FOLDER = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_FILES = {path.name: path for path in _FOLDER.iterdir() if path.suffix in _TYPES}
_PAGE = _FILES.pop("index.html")
# Scenes of the bundled model that training never draws, and that show what questions it knows.
_EXAMPLES = (102_007, 20, 9)
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


def is_on(host: str | None, wanted: bool | None) -> bool:
    """Whether there is a playground: as the operator wants, else on loopback addresses only."""
    if wanted is not None:
        return wanted
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "0.0.0.0").is_loopback
    except ValueError:
        return False


def address(host: str | None, port: int, root_path: str) -> str:
    """Where a browser on this machine finds the page."""
    everywhere = host in (None, "", "0.0.0.0", "::")
    name = "localhost" if everywhere else f"[{host}]" if ":" in str(host) else host
    return f"http://{name}:{port}{root_path.rstrip('/')}{PATH}"


def playground(args: Namespace, settings: GatewaySettings) -> APIRouter:
    """The routes. They need no API key: the page asks for one, and sends it to `/v1` only."""
    router = APIRouter(prefix=PATH, include_in_schema=False)
    facts = _facts(args, settings)

    @router.get("")
    async def page() -> Response:
        return _answer(_PAGE)

    @router.get("/settings.json")
    async def read_settings() -> Response:
        return JSONResponse(facts, headers=_HEADERS)

    @router.get("/examples/{index}.png")
    async def example(index: str) -> Response:
        for number, (picture, _, _) in enumerate(_examples()):
            if str(number) == index:
                return Response(picture, media_type="image/png", headers=_HEADERS)
        raise _no_such_file()

    @router.get("/{name:path}")
    async def asset(name: str) -> Response:
        # The page's links are relative. Behind "/playground/" they have the folder twice.
        return _file(name.removeprefix("playground/"))

    return router


def _facts(args: Namespace, settings: GatewaySettings) -> dict[str, Any]:
    """What the page must know of the server. `himap_info` of `/metrics` has as much."""
    engine: EngineSettings = EngineSettings.parse(args.additional_config[ADDITIONAL_CONFIG_KEY])
    return {
        "needs_key": settings.api_keys_file is not None,
        "traces": settings.allow_traces,
        "shallow_ratio": engine.shallow_ratio,
        "deep_ratio": engine.deep_ratio,
        "max_shallow_ratio": engine.max_shallow_ratio,
        "max_deep_ratio": engine.max_deep_ratio,
        "criteria": list(engine.criteria),
        "choice_stays": engine.votes == "turn" or not engine.needs_text,
        "max_image_bytes": settings.max_image_bytes,
        "examples": [{"alt": alt, "questions": asked} for _, alt, asked in _examples()],
    }


@cache
def _examples() -> list[tuple[bytes, str, list[str]]]:
    """PNG, description and questions of each example picture; none without `himap_demo`."""
    try:
        from himap_demo.heldout import FIRST_SEED
        from himap_demo.questions import ask, describe
        from himap_demo.scenes import draw, make_scene
    except ImportError:
        return []
    found = []
    for number in _EXAMPLES:
        scene = make_scene(FIRST_SEED + number)
        file = io.BytesIO()
        draw(scene).save(file, "PNG")
        kinds = dict.fromkeys(("color", "number", "word", "where", "shape"), 1.0)
        asked = [question.text for question in ask(random.Random(number), scene, 3, kinds)]
        found.append((file.getvalue(), describe(scene), asked))
    return found


def _file(name: str) -> Response:
    path = _FILES.get(name)
    if path is None:
        raise _no_such_file()
    return _answer(path)


def _answer(path: Path) -> Response:
    kind = f"{_TYPES[path.suffix]}; charset=utf-8"
    return Response(path.read_bytes(), media_type=kind, headers=_HEADERS)


def _no_such_file() -> GatewayError:
    return GatewayError(404, "the playground has no such file", reason=Reason.NOT_FOUND)
