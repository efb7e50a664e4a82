# SPDX-License-Identifier: Apache-2.0
"""First run: ask a small model about a picture through the OpenAI SDK, with and without pruning.

The script starts `vllm serve` with the plugin on a free port, asks a few questions, prints what
pruning saved, and stops the server. With `--url` it asks a server that is already running.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shlex
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from himap_demo import MODEL_PATH
from himap_eval.local_server import launch
from openai import OpenAI

HERE = Path(__file__).parent
QUESTIONS = (
    "What color is the star?",
    "What number is on the pink card?",
    "What shape is the object at the top right?",
    "Where is the blue diamond?",
)
RATIOS = {"off": (0.0, 0.0), "(0.5, 0.75)": (0.5, 0.75)}
HIMAP = json.loads((MODEL_PATH / "himap.json").read_text())


@contextmanager
def serving() -> Iterator[str]:
    """Run `vllm serve` with the plugin; yields its URL."""
    command = [
        str(Path(sys.executable).with_name("vllm")), "serve", str(MODEL_PATH),
        "--additional-config", json.dumps({"himap": HIMAP}),
        "--kv-cache-memory-bytes", "256M", "--enforce-eager",
    ]  # fmt: skip
    print("$ VLLM_PLUGINS=himap,himap_stats", shlex.join(command), flush=True)
    print("Starting takes about a minute ...", flush=True)
    print("To see what is kept: himap serve --enforce-eager --host 127.0.0.1")
    print("Then open http://localhost:8000/playground\n")
    environment = {**os.environ, "VLLM_PLUGINS": "himap,himap_stats"}
    with (
        tempfile.TemporaryDirectory() as folder,
        launch(command, environment, Path(folder, "log")) as server,
    ):
        server.wait_for("/health")
        yield server.url


def ask(client: OpenAI, model: str, image: Path, question: str, ratios: tuple[float, float]) -> str:
    """One chat completion about a picture."""
    data = base64.b64encode(image.read_bytes()).decode()
    message: Any = {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
            {"type": "text", "text": question},
        ],
    }
    completion = client.chat.completions.create(
        model=model,
        messages=[message],
        temperature=0,
        max_tokens=20,
        extra_body={
            "vllm_xargs": {"himap_shallow_ratio": ratios[0], "himap_deep_ratio": ratios[1]}
        },
    )
    return (completion.choices[0].message.content or "").strip()


def stats(url: str) -> dict[str, Any]:
    """The plugin's counters."""
    try:
        with urllib.request.urlopen(f"{url}/plugins/himap/stats", timeout=30) as response:
            counters: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        sys.exit(
            f"The server has no counters ({error}). Start `vllm serve` with "
            "VLLM_PLUGINS=himap,himap_stats."
        )
    return counters


def show(url: str, image: Path) -> None:
    """Ask every question at every ratio pair and print answers and savings."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    print(f"{'question':36}", *(f"{name:>14}" for name in RATIOS))
    for question in QUESTIONS:
        answers = [ask(client, model, image, question, pair) for pair in RATIOS.values()]
        print(f"{question:36}", *(f"{answer:>14}" for answer in answers))
    counters = stats(url)
    held, saved = counters["kv_blocks"], counters["kv_blocks_saved"]
    requests = counters["requests"]
    print(
        f"\nThe image was pruned for {requests['pruned']} of the requests, and "
        f"{requests.get('reused', 0)} more found it in the prefix cache.\n"
        f"{counters['image_tokens']} image tokens, "
        f"{counters['image_tokens_kept_shallow']} kept after layer {HIMAP['shallow_layer']}, "
        f"{counters['image_tokens_kept_deep']} after layer {HIMAP['deep_layer']};\n"
        f"{held} KV blocks instead of {held + saved}, {counters['kv_bytes_saved'] >> 10} KiB saved"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="a running server, such as http://127.0.0.1:8000")
    parser.add_argument("--image", type=Path, default=HERE / "scene.png")
    args = parser.parse_args()
    if args.url:
        show(args.url, args.image)
    else:
        with serving() as url:
            show(url, args.image)


if __name__ == "__main__":
    main()
