# SPDX-License-Identifier: Apache-2.0
"""Traffic that reuses its prefixes, on stock vLLM and on pruned engines.

    python -m bench.conversation [MODEL]

Every engine has prefix caching on and lives in a process of its own; they take turns. The traffic:

* `turns`: one picture, then question after question, each after the answer to the one before;
* `questions`: questions on one picture, each in a conversation of its own;
* `resend`: the same request again and again;
* `n`: one request with n = 1, 4 and 16;
* `agent`: a picture in every one of 20 turns;
* `load`: conversations at once, 1 to 16;
* `pressure`: conversations in turns, with a KV cache that holds about half of them.

The model is a small LLaVA with random weights and 576 image tokens, or, on a GPU, one of
LLaVA-1.5-7B's shape; MODEL may be another one that takes LLaVA-1.5's prompts. Tables have the
median time to first token of stock vLLM, that of the others over stock's (medians of the rounds'
ratios), and the share of prompt tokens that came from the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import string
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from bench.model import IMAGE_SIZE, LLAVA_7B, PATCH_SIZE
from bench.samples import STOCK, UNPRUNED, Sample, Samples, turns
from bench.tables import environment, progress, run_parser, table, versions
from bench.worker import Worker
from tests.checkpoints import build_llava, sample_images

CUTS = {"shallow_layer": 2, "deep_layer": 8, "shallow_ratio": 0.5, "deep_ratio": 0.75}
HIMAP = CUTS | {"criterion": "himap"}
SYSTEMS: dict[str, dict[str, Any] | None] = {
    STOCK: None,
    UNPRUNED: CUTS | {"shallow_ratio": 0, "deep_ratio": 0},
    "votes: turn": HIMAP | {"votes": "turn"},
    "votes: all": HIMAP | {"votes": "all"},
    "default": CUTS,
    "uniform": CUTS | {"criterion": "uniform"},
}
ANSWER_TOKENS = 8
STEP_TOKENS = 4096
LIMIT_SECONDS = 3600


class Ask(NamedTuple):
    """One request: `label` says which place it has in its traffic."""

    label: str
    prompt: str
    pictures: tuple[int, ...]
    n: int = 1


User = Generator[Ask, str, None]
"""Yields requests and gets their answers."""


def conversation(picture: int, number: int, each_turn: bool = False, label: str = "") -> User:
    """`number` questions on a picture, or, `each_turn`, on a new one in each."""
    text, pictures = "", []
    for turn in range(number):
        if each_turn or not turn:
            pictures.append(picture + turn)
            text += "USER: <image>\n"
        else:
            text += "USER: "
        text += f"Turn {turn}: what else is there to see? ASSISTANT:"
        answer = yield Ask(label or str(turn + 1), text, tuple(pictures))
        text += f"{answer}</s>"


def questions(picture: int, number: int, same: bool = False) -> User:
    """Requests on one picture; `same`: all alike."""
    for index in range(number):
        text = f"USER: <image>\nQuestion {0 if same else index}: what is it? ASSISTANT:"
        yield Ask(str(index + 1), text, (picture,))


def samples(picture: int) -> User:
    """Several answers to one request."""
    for index, n in enumerate((1, 4, 16)):
        yield Ask(str(n), "USER: <image>\nTell me a story. ASSISTANT:", (picture + index,), n)


class Traffic(NamedTuple):
    """`users(number)` are those of a round; `at_once` of them have a request under way."""

    name: str
    users: Callable[[int], list[User]]
    at_once: int = 1
    blocks: float = 1.0  # share of the KV cache that may be used


def _load(at_once: int, first: int) -> list[User]:
    return [
        conversation(first + 10 * user, 4, label=f"{at_once} at once") for user in range(at_once)
    ]


TRAFFIC = [
    Traffic("turns", lambda first: [conversation(first, 8)]),
    Traffic("questions", lambda first: [questions(first, 8)]),
    Traffic("resend", lambda first: [questions(first, 3, same=True)]),
    Traffic("n", lambda first: [samples(first)]),
    Traffic("agent", lambda first: [conversation(first, 20, each_turn=True)]),
    *(Traffic("load", partial(_load, at_once), at_once) for at_once in (1, 4, 16)),
    Traffic(
        "pressure", lambda first: [conversation(first + 10 * user, 4) for user in range(8)],
        blocks=0.035,
    ),
]  # fmt: skip


class Player:
    """One engine, in the process of a `Worker`."""

    def __init__(self, himap: str, options: dict[str, Any], letters_only: bool) -> None:
        from vllm import LLM, SamplingParams

        settings = json.loads(himap)
        self._llm = LLM(
            max_num_batched_tokens=STEP_TOKENS, max_num_seqs=32, disable_log_stats=False,
            enable_prefix_caching=True, limit_mm_per_prompt={"image": 20}, seed=0,
            additional_config={"himap": settings} if settings else {}, **options,
        )  # fmt: skip
        letters = self._llm.get_tokenizer().convert_tokens_to_ids([*string.ascii_lowercase])
        self._params = partial(
            SamplingParams,
            ignore_eos=True,
            allowed_token_ids=letters if letters_only else None,  # random weights say anything
        )  # fmt: skip
        core = self._llm.llm_engine.engine_core.engine_core
        self._pool = core.scheduler.kv_cache_manager.block_pool

    def play(self, index: int, first: int) -> list[tuple[str, float, float]]:
        """Play `TRAFFIC[index]`, with an empty cache at first.

        Returns:
            Of each request: label, seconds to the first token, share of the prompt that was cached.
        """
        traffic = TRAFFIC[index]
        self._llm.reset_prefix_cache()
        pinned = self._pool.get_new_blocks(
            int(self._pool.get_num_free_blocks() * (1 - traffic.blocks))
        )
        try:
            return list(self._drive(deque(traffic.users(first)), traffic.at_once))
        finally:
            self._pool.free_blocks(pinned)

    def _drive(self, users: deque[User], at_once: int) -> Iterator[tuple[str, float, float]]:
        waiting: deque[tuple[User, Ask]] = deque((user, next(user)) for user in users)
        running: dict[str, tuple[User, Ask, float]] = {}
        while waiting or running:
            while waiting and len(running) < at_once:
                user, ask = waiting.popleft()
                began = time.perf_counter()
                running[self._send(ask)] = user, ask, began
            for output in self._llm.llm_engine.step():
                if not output.finished:
                    continue
                user, ask, began = running.pop(output.request_id)
                seconds = output.metrics.first_token_latency if output.metrics else 0.0
                if ask.n > 1:  # until each has one
                    seconds = time.perf_counter() - began
                cached = (output.num_cached_tokens or 0) / len(output.prompt_token_ids)
                yield ask.label, seconds, cached
                try:
                    waiting.append((user, user.send(output.outputs[0].text)))
                except StopIteration:
                    continue

    def _send(self, ask: Ask) -> str:
        pictures = [sample_images(1, seed, size=IMAGE_SIZE)[0] for seed in ask.pictures]
        prompt = {"prompt": ask.prompt, "multi_modal_data": {"image": pictures}}
        several = ask.n > 1
        params = self._params(
            n=ask.n, temperature=float(several), max_tokens=1 if several else ANSWER_TOKENS
        )
        (request_id,) = self._llm.enqueue([prompt], params, use_tqdm=False)
        return str(request_id).partition("-")[0]  # the engine adds to it

    def started(self) -> bool:
        """Whether the engine runs: it does once this answers."""
        return True

    def close(self) -> None:
        """Nothing: the process ends."""


def markdown(found: Samples) -> str:
    """One table for each traffic."""
    parts = []
    systems = [name for name in SYSTEMS if any(sample.system == name for sample in found)]
    others = [name for name in systems if name != STOCK]
    for name in dict.fromkeys(load[0] for load in found.loads()):
        rows = []
        for load in found.loads():
            if load[0] != name:
                continue
            stock = found.median("ttft", load, STOCK)
            ratios = [found.compare("ttft", load, system, STOCK).show(".2f") for system in others]
            cached = [f"{found.median('cached', load, system):.0%}" for system in systems]
            rows.append([load[1], f"{1000 * (stock or 0):.0f}", *ratios, " / ".join(cached)])
        head = [name, "stock, ms", *(f"{system}, x" for system in others), "cached"]
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def main() -> None:
    """Play all traffic on all engines, round by round; print tables."""
    parser = run_parser("bench.conversation", __doc__)
    parser.add_argument("model", nargs="?", help="path or name on the hub (default: made here)")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--kv-mib", type=int, help="size of the KV cache (1536; on a GPU 6144)")
    parser.add_argument("--traffic", action="append", help="only this; may be repeated")
    parser.add_argument("--system", action="append", choices=SYSTEMS, help="stock and these only")
    parser.add_argument("--layers", type=int, default=12, help=argparse.SUPPRESS)
    parser.add_argument("--gpu", action="store_true", help="LLaVA-1.5-7B's shape, with graphs")
    parser.add_argument("--json", type=Path, help="file for the raw numbers")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    options = _options(args)
    wanted = [STOCK, *(args.system or SYSTEMS)]
    workers = {
        name: Worker(
            Player, json.dumps(himap), options, args.model is None,
            log=args.work_dir / f"{name.replace(':', '').replace(' ', '-')}.log",
            environment=dict(os.environ)
            | {"VLLM_PLUGINS": "himap" if himap else "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        )
        for name, himap in SYSTEMS.items() if name in wanted
    }  # fmt: skip
    with ThreadPoolExecutor(len(workers) if args.gpu else 1) as pool:  # mostly compilation
        for started in [pool.submit(w.call, LIMIT_SECONDS, "started") for w in workers.values()]:
            started.result()
    chosen = [i for i, each in enumerate(TRAFFIC) if each.name in (args.traffic or [each.name])]
    try:
        found = _play(workers, chosen, args.rounds, args.json)
    finally:
        for worker in workers.values():
            worker.stop()
    machine = environment()
    print(
        f"{machine['cpu']}, {machine['cores']} cores; {versions(machine)}; {args.rounds} rounds.\n"
    )
    print(markdown(found))


def _play(
    workers: dict[str, Worker], chosen: list[int], rounds: int, output: Path | None
) -> Samples:
    """Play `TRAFFIC`'s `chosen` on all engines; `output` gets what is known so far."""
    found = Samples()
    for number in range(-1, rounds):  # the first is not counted
        for index in chosen if number >= 0 else [0]:
            for name in turns(list(workers), number + 1):
                progress(f"round {number + 1} of {rounds}, {TRAFFIC[index].name}, {name}")
                first = 10_000 * (number + 1) + 1000 * index
                heard = workers[name].call(LIMIT_SECONDS, "play", index, first)
                if number >= 0:
                    found += _samples(TRAFFIC[index].name, name, number, heard)
            if output:
                output.write_text(json.dumps([asdict(sample) for sample in found], indent=1) + "\n")
    return found


def _samples(
    traffic: str, system: str, number: int, heard: list[tuple[str, float, float]]
) -> Iterator[Sample]:
    for label in dict.fromkeys(each[0] for each in heard):
        own = [each for each in heard if each[0] == label]
        values = {"ttft": mean(each[1] for each in own), "cached": mean(each[2] for each in own)}
        yield Sample((traffic, label), system, number, values, own)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Of the engines, all alike."""
    options: dict[str, Any] = {
        "kv_cache_memory_bytes": (args.kv_mib or (6144 if args.gpu else 1536)) << 20,
        "max_model_len": 4096,
    }
    if args.gpu:
        path = LLAVA_7B.checkpoint(args.work_dir, weights=False)
        options |= {"load_format": "dummy", "dtype": "bfloat16", "gpu_memory_utilization": 0.05}
    else:
        path = _checkpoint(args.work_dir, args.layers)
        # The smallest blocks, as the plugin has them: with larger ones, stock finds less.
        options |= {"enforce_eager": True, "max_model_len": 16384, "block_size": 32}
    return options | {"model": args.model or str(path)}


def _checkpoint(folder: Path, num_layers: int) -> Path:
    path = folder / f"llava-{num_layers}"
    if not (path / "config.json").exists():
        build_llava(
            path, num_layers=num_layers, num_heads=6, num_kv_heads=6, hidden_size=384,
            intermediate_size=1024, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE,
            max_position_embeddings=16384,
        )  # fmt: skip
    return path


if __name__ == "__main__":
    main()
