# SPDX-License-Identifier: Apache-2.0
"""Asks engines on a GPU: `python -m tests.gpu.answers FOLDER`.

FlashAttention takes no float32, so answers are in float16. They come with what each cut kept, into
`FOLDER/answers.jsonl`, for `tests.gpu.compare` on any machine: the oracle computes on a CPU, for
longer than a lent GPU lasts. Engines that fail leave their error there; logs are in `logs.txt`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from pathlib import Path
from typing import Any

from tests.engines import BLOCK_SIZE
from tests.gpu.setups import Setup, setups
from tests.isolated import ROOT

OPTIONS: dict[str, Any] = {
    "dtype": "float16",
    "block_size": 16,
    "kv_cache_memory_bytes": 512 << 20,
    "gpu_memory_utilization": 0.02,
    "max_model_len": 1024,
    "max_num_batched_tokens": 1024,
    "max_cudagraph_capture_size": 64,
}
SECONDS = 400.0
LOG_BYTES = 200_000  # of each log, its end
ENVIRONMENT = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # FlashInfer need not be there
    "VLLM_HOST_IP": "127.0.0.1",  # vLLM looks for it by way of the network
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}


def ask(setup: Setup, folder: Path) -> dict[str, Any]:
    """Start the engine and write down what it answers."""
    from vllm.platforms import current_platform

    from tests.world import World

    world, began = World(folder), time.monotonic()
    options = OPTIONS | setup.options
    if current_platform.is_cpu():  # only to try this script
        options |= {"dtype": "float32", "block_size": BLOCK_SIZE}
    if setup.himap is None:
        engine = world.stock(setup.shape, compiled=setup.compiled, **options)
    else:
        himap = {"trace_requests": 256, **setup.himap}
        engine = world.engine(setup.shape, himap=himap, compiled=setup.compiled, **options)
    started = time.monotonic() - began
    answers = []
    for batch in setup.batches:
        outputs = engine.generate(batch)
        answers.append([_answer(engine, setup, output) for output in outputs])
    found = {"setup": setup.name, "start_seconds": started, "batches": answers}
    if setup.himap is not None:
        found["stats"] = engine.stats
        groups = engine.scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups
        found["kv_groups"] = [[g.kv_cache_spec.block_size, len(g.layer_names)] for g in groups]
    return found


def _answer(engine: Any, setup: Setup, output: Any) -> dict[str, Any]:
    (completion,) = output.outputs
    trace = None
    if setup.himap is not None:
        trace = engine.llm.collective_rpc("himap_trace", args=(output.request_id,))[0]
    return {
        "prompt": list(output.prompt_token_ids),
        "cached": output.num_cached_tokens or 0,
        "tokens": list(completion.token_ids),
        "logprobs": [
            step[token].logprob
            for step, token in zip(completion.logprobs, completion.token_ids, strict=True)
        ],
        "trace": trace,
    }


def serve(names: list[str], output: Path) -> None:
    """Ask the setups of these names, in this process."""
    wanted = {setup.name: setup for setup in setups()}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            try:
                found = ask(wanted[name], Path(folder))
            except Exception as error:
                traceback.print_exc()
                found = {"setup": name, "error": f"{type(error).__name__}: {error}"[:2000]}
            with output.open("a") as file:
                file.write(json.dumps(found, default=str) + "\n")
            print(f"done: {name}", flush=True)


def main() -> int:
    """Share the setups among processes; 1 if one of them failed."""
    parser = argparse.ArgumentParser("tests.gpu.answers", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--at-once", type=int, default=6, help="processes (6)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="then what is left ends")
    parser.add_argument("--only", action="append", help="a setup; may be repeated")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.serve is not None:
        serve(args.only, args.serve)
        return 0
    chosen = [setup for setup in setups() if not args.only or setup.name in args.only]
    if not chosen:
        parser.error("--only: no setup has such a name")
    answers, logs = args.folder / "answers.jsonl", args.folder / "logs.txt"
    for file in (answers, logs):
        file.write_bytes(b"")
    _share(chosen, args.at_once, args.seconds, answers, logs)
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    failed = [f"{each['setup']}: {each['error']}" for each in found if "error" in each]
    missing = {setup.name for setup in chosen} - {each["setup"] for each in found}
    print(f"{len(found) - len(failed)} of {len(chosen)} setups answered.", *failed, sep="\n")
    if missing:
        print(f"No answer: {', '.join(sorted(missing))}")
    return int(bool(failed or missing))


def _share(chosen: list[Setup], at_once: int, seconds: float, answers: Path, logs: Path) -> None:
    """Each setup in a process of its own, so that one that dies takes no other with it.

    What they answer is written as they end: whatever ends this process, it is not lost.
    """
    waiting, running = deque(chosen), dict[Path, subprocess.Popen[bytes]]()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        while (waiting or running) and time.monotonic() < began + seconds:
            while waiting and len(running) < at_once:
                setup = waiting.popleft()
                base = Path(folder, setup.name)
                running[base] = _start(setup, base)
            time.sleep(0.1)
            for base in [base for base, process in running.items() if process.poll() is not None]:
                print(f"{time.monotonic() - began:.0f} s: {base.name}", flush=True)
                del running[base]
                _append(base, answers, logs)
        for base, process in running.items():
            process.kill()
            process.wait()
            _append(base, answers, logs)


def _start(setup: Setup, base: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.gpu.answers", str(base.parent)]
    command += ["--only", setup.name, "--serve", f"{base}.jsonl"]
    plugins = {"VLLM_PLUGINS": "" if setup.himap is None else "himap"}
    environment = ENVIRONMENT | dict(os.environ) | plugins
    with Path(f"{base}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def _append(base: Path, answers: Path, logs: Path) -> None:
    found, log = Path(f"{base}.jsonl"), Path(f"{base}.log")
    with answers.open("ab") as file:
        file.write(found.read_bytes() if found.exists() else b"")
    with logs.open("ab") as file:
        file.write(f"==> {base.name}\n".encode() + log.read_bytes()[-LOG_BYTES:] + b"\n")


if __name__ == "__main__":
    sys.exit(main())
