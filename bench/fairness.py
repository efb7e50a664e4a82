# SPDX-License-Identifier: Apache-2.0
"""Time to first token of prompts with images while others decode: stock vLLM against pruning.

    python -m bench.fairness [MODEL]

A pruned prompt is computed in one step from its first image on, so it may have to wait for a step
with that much room. `--decoding` requests decode all the time; one prompt with an image arrives
every `--every` steps, with a text before the image that leaves hardly any room in a step. The table
has the median and the 99th percentile of the time to first token.
"""

from __future__ import annotations

import argparse
from itertools import count
from statistics import quantiles

from bench.pair import both, chat, engine, options

ANSWER_TOKENS = 4


def measure(args: argparse.Namespace, himap: str) -> tuple[list[float], int]:
    """One engine: seconds to the first token of each prompt; tokens of a prompt."""
    llm = engine(args, himap, max_num_seqs=64, max_num_batched_tokens=args.limit)
    from vllm import SamplingParams

    decode = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    answer = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True)

    def add_decoding(number: int) -> None:
        llm.enqueue_chat([chat("Count.")] * number, decode, use_tqdm=False)

    add_decoding(args.decoding)
    seconds: list[float] = []
    length, numbers = 0, iter(range(args.prompts))
    for step in count():
        if step % args.every == 0 and (number := next(numbers, None)) is not None:
            prompt = chat("What is it?", number, "word " * args.words)
            llm.enqueue_chat([prompt], answer, use_tqdm=False)
        for output in llm.llm_engine.step():
            if output.finished and len(output.outputs[0].token_ids) == ANSWER_TOKENS:
                seconds.append(output.metrics.first_token_latency)
                length = len(output.prompt_token_ids)
            elif output.finished:
                add_decoding(1)
        if len(seconds) == args.prompts:
            break
    return seconds, length


def main() -> None:
    """Run both engines, one after the other, each in a process of its own; print a table."""
    parser = options(__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--decoding", type=int, default=20, help="requests that decode (20)")
    add("--prompts", type=int, default=100, help="prompts with an image (100)")
    add("--every", type=int, default=10, help="steps between two of them (10)")
    add("--limit", type=int, default=256, help="tokens of a step (256)")
    add("--words", type=int, default=70, help="before the image (70)")
    args = parser.parse_args()
    results = both(measure, args)
    print(f"\n{'time to first token, ms':26}{'median':>10}{'p99':>10}{'longest':>10}")
    for name, (seconds, _) in zip(("stock", "pruned"), results, strict=True):
        cuts = quantiles(seconds, n=100, method="inclusive")
        row = (cuts[49], cuts[98], max(seconds))
        print(f"{name:26}" + "".join(f"{1000 * value:10.1f}" for value in row))
    print(
        f"prompts of {results[0][1]} tokens, steps of at most {args.limit}, {args.decoding} others "
        "decode"
    )


if __name__ == "__main__":
    main()
