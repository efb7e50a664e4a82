# SPDX-License-Identifier: Apache-2.0
"""Load from `vllm bench serve`, run inside this process.

Its command line and its code, but without starting Python and importing vLLM anew for each of the
many short measurements.

* `vllm.benchmarks.serve.add_cli_args`, `vllm.benchmarks.serve.main_async` (called): to run the
  command in this process. Remove when: it has a documented Python interface.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.model import IMAGE_SIZE


@dataclass(frozen=True)
class Load:
    """One measurement: so many different requests, so many of them at once."""

    concurrency: int
    num_requests: int
    text_tokens: int
    output_tokens: int
    seed: int
    images: int = 1  # per request

    def run(self, url: str, model: Path, xargs: Mapping[str, float], log: Path) -> dict[str, Any]:
        """Put it on the server of `model`; the result, the command's output being put in `log`.

        Raises:
            RuntimeError: a request failed.
        """
        from vllm.benchmarks.serve import add_cli_args, main_async
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        options = {
            "backend": "openai-chat",
            "base-url": url,
            "endpoint": "/v1/chat/completions",
            "model": model,
            "served-model-name": model.name,
            "dataset-name": "random-mm",
            "random-input-len": self.text_tokens,
            "random-output-len": self.output_tokens,
            "random-mm-base-items-per-request": self.images,
            "random-mm-num-mm-items-range-ratio": 0,
            "random-mm-limit-mm-per-prompt": '{"image": 1}',
            "random-mm-bucket-config": f"{{({IMAGE_SIZE}, {IMAGE_SIZE}, 1): 1.0}}",
            "num-prompts": self.num_requests,
            "max-concurrency": self.concurrency,
            "seed": self.seed,
            "temperature": 0,
            # The trial request is the first of the load, and would leave it in the caches.
            "ready-check-timeout-sec": 0,
        }
        arguments = ["--ignore-eos", "--disable-tqdm", "--save-detailed"]
        arguments += [f"--{name}={value}" for name, value in options.items()]
        if xargs:
            arguments.append("--extra-body=" + json.dumps({"vllm_xargs": dict(xargs)}))
        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        with (
            log.open("a") as output,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            result: dict[str, Any] = asyncio.run(main_async(parser.parse_args(arguments)))
        if result["failed"]:
            raise RuntimeError(f"{result['failed']} requests failed; see {log}")
        del result["generated_texts"], result["errors"]
        return result
