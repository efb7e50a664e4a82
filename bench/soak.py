# SPDX-License-Identifier: Apache-2.0
"""Good, hostile and broken-off requests by the thousand: `python -m bench.soak --requests 10000`.

Starts `himap serve` on a tiny checkpoint and sends it a seeded mix at a fixed concurrency, all on
loopback. Then the service must be as it was: ready, idle, its KV cache empty, a good request
answered as before the first one, no larger than after the warm-up. Prints Markdown; the exit status
is 1 where a check failed. The server's log stays in `--work-dir`.

Memory: the caches that have a bound, of processed images and of kernels, are set so small that they
are full before the warm-up is over.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import io
import json
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import psutil
from aiohttp import web
from PIL import Image

from bench.report import Check, table
from bench.serve import progress
from bench.server import Server
from tests.checkpoints import IMAGE_ID, build_llava

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
WARM_UP = 0.2  # share of the requests
WINDOW = 0.1  # share of the requests whose samples of memory are taken together
GROWTH_ALLOWED = 0.05
SAMPLE_SECONDS = 0.25
REQUEST_SECONDS = 120.0
IDLE_SECONDS = 30.0
MAX_BODY_BYTES = 1 << 20
MAX_SURPRISES = 20
OLD_IMAGES = 50  # sent again and again; others are new

GOOD, LEFT, HOSTILE = "good", "left", "hostile"
# What a kind of request may be answered with; 0: nothing, the connection was closed. A server that
# is asked for too much may always say so.
ALLOWED = {
    GOOD: frozenset({200, 503}),
    LEFT: frozenset({0, 200, 503}),
    HOSTILE: frozenset({400, 401, 403, 404, 405, 413, 415, 503}),
}


class Gateway(Server):
    """`himap serve` on a tiny model."""

    ready_path = "/health/ready"

    def __init__(self, checkpoint: Path, flags: list[str], log: Path) -> None:
        """Prepare, but don't start yet."""
        arguments = [
            "--enforce-eager",
            "--dtype", "float32",
            "--max-model-len", "512",
            "--max-num-seqs", "8",
            "--block-size", "32",
            "--kv-cache-memory-bytes", str(64 << 20),
            "--mm-processor-cache-gb", "0.02",
            "--shallow-layer", "2",
            "--deep-layer", "8",
            "--max-body-bytes", str(MAX_BODY_BYTES),
            "--image-timeout", "6",
            "--enable-auto-tool-choice",
            "--tool-call-parser", "hermes",
            *flags,
        ]  # fmt: skip
        super().__init__(checkpoint, arguments, "himap", log)
        self._environment.pop("VLLM_SERVER_DEV_MODE")
        # On a CPU the kernels for every new shape of a batch are kept, by default 1024 of them:
        # the worker would grow by some 200 MiB until that is full, after thousands of requests.
        self._environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "8"
        self.command[0] = str(Path(sys.executable).with_name("himap"))

    @property
    def process(self) -> psutil.Process:
        """The API server's."""
        assert self._process is not None
        return psutil.Process(self._process.pid)

    def memory(self) -> dict[str, int]:
        """Resident bytes by process: the API server, and the engine's by their names."""
        sizes: Counter[str] = Counter()
        for process in (self.process, *self.process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                words = " ".join(process.cmdline())
                engine = next((name for name in ("EngineCore", "Worker") if name in words), "")
                name = "API server" if process.pid == self.process.pid else engine
                if name:  # Python's resource tracker is not of interest
                    sizes[name] += process.memory_info().rss
        return dict(sizes)

    def metric(self, name: str) -> float:
        """Sum of a metric's series."""
        return sum(
            float(line.rpartition(" ")[2])
            for line in self._request("GET", "/metrics").decode().splitlines()
            if line.partition("{")[0].partition(" ")[0] == name
        )


class Reply(NamedTuple):
    """Status, 0 where the client did not wait for it, and what there is to tell if it is wrong."""

    status: int
    text: str = ""


@dataclass
class Traffic:
    """Makes requests and sends them.

    Attributes:
        outcomes: by kind of request, how often which status came back.
        surprises: the first few that should not have been, as text.
        memory: samples (requests done, seconds, bytes by process).
    """

    session: aiohttp.ClientSession
    url: str
    image_url: str
    random: Random
    outcomes: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    surprises: list[str] = field(default_factory=list)
    memory: list[tuple[int, float, dict[str, int]]] = field(default_factory=list)
    done: int = 0

    def kinds(self) -> list[tuple[int, str, str, Callable[[], Awaitable[Reply]]]]:
        """Weight, whether good, name, and how to send one."""
        return [
            (10, GOOD, "chat, text", self._chat_text),
            (14, GOOD, "chat, image", self._chat_image),
            (10, GOOD, "chat, image, stream", self._chat_stream),
            (4, GOOD, "chat, fetched image", self._chat_fetched),
            (4, GOOD, "chat, n=2, logprobs", self._chat_samples),
            (4, GOOD, "chat, structured", self._chat_structured),
            (6, GOOD, "completions", self._completions),
            (6, GOOD, "responses, image", self._responses),
            (6, GOOD, "responses, stream", self._responses_stream),
            (6, LEFT, "stream, left", self._stream_left),
            (4, LEFT, "answer, not awaited", self._answer_left),
            (3, LEFT, "body, not finished", self._body_left),
            (3, HOSTILE, "no or wrong key", self._key),
            (2, HOSTILE, "no route", self._route),
            (2, HOSTILE, "body too large", self._large),
            (6, HOSTILE, "no JSON", self._no_json),
            (6, HOSTILE, "image refused", self._bad_image),
            (10, HOSTILE, "field refused", self._bad_field),
        ]

    async def send_one(self) -> None:
        """One request of a kind chosen by weight."""
        kinds = self.kinds()
        (_, sort, name, send), *_ = self.random.choices(kinds, [kind[0] for kind in kinds])
        try:
            reply = await asyncio.wait_for(send(), REQUEST_SECONDS)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            reply = Reply(-1, repr(error))
        self.outcomes[f"{sort}: {name}"][reply.status] += 1
        self.done += 1
        if reply.status not in ALLOWED[sort] and len(self.surprises) < MAX_SURPRISES:
            self.surprises.append(f"{name}: {reply.status} {reply.text}")

    # How requests are sent

    async def _post(self, path: str, body: Any, **headers: str) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        async with self.session.post(self.url + path, data=data, headers=headers) as answer:
            text = await answer.text()
            # An error inside of a stream has no status of its own.
            failed = answer.status == 200 and '"error":{' in text
            return Reply(500 if failed else answer.status, f"{text[-300:]} for {data[-300:]!r}")

    async def _leave(self, path: str, body: Any, chunks: int) -> Reply:
        async with self.session.post(self.url + path, json=body) as answer:
            for _ in range(chunks):
                await answer.content.readany()
            answer.close()
            return Reply(answer.status)

    # Good

    def _picture(self) -> str:
        # Old ones are in the caches, new ones push others out.
        old = self.random.random() < 0.5
        noise = Random(self.random.randrange(OLD_IMAGES) if old else self.random.random())
        buffer = io.BytesIO()
        Image.frombytes("RGB", (32, 32), noise.randbytes(3 * 32 * 32)).save(buffer, "PNG")
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

    def _message(self, url: str) -> dict[str, Any]:
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "What?"},
        ]
        return {"role": "user", "content": parts}

    def _chat(self, **fields: Any) -> dict[str, Any]:
        return {
            "model": "tiny",
            "messages": [self._message(self._picture())],
            "max_tokens": self.random.randrange(1, 32),
            "himap": {"shallow_ratio": self.random.choice((0, 0.25, 0.5))},
            "user": secrets.token_hex(4),
            **fields,
        }

    async def _chat_text(self) -> Reply:
        words = " ".join(str(self.random.random()) for _ in range(self.random.randrange(1, 10)))
        return await self._post(CHAT, self._chat(messages=[{"role": "user", "content": words}]))

    async def _chat_image(self) -> Reply:
        return await self._post(CHAT, self._chat(), **{"X-Request-Id": secrets.token_hex(16)})

    async def _chat_stream(self) -> Reply:
        options = {"include_usage": True}
        return await self._post(CHAT, self._chat(stream=True, stream_options=options))

    async def _chat_fetched(self) -> Reply:
        url = f"{self.image_url}/{self.random.randrange(10**6)}.png"
        return await self._post(CHAT, self._chat(messages=[self._message(url)]))

    async def _chat_samples(self) -> Reply:
        body = self._chat(n=2, temperature=1, logprobs=True, top_logprobs=3)
        return await self._post(CHAT, body)

    async def _chat_structured(self) -> Reply:
        choices = [secrets.token_hex(4), "no"]  # every grammar is compiled and kept: a new one
        return await self._post(CHAT, self._chat(structured_outputs={"choice": choices}))

    async def _completions(self) -> Reply:
        prompts = [str(self.random.random()) for _ in range(self.random.randrange(1, 4))]
        return await self._post(TEXT, {"model": "tiny", "prompt": prompts, "max_tokens": 8})

    def _response(self, **fields: Any) -> dict[str, Any]:
        content = [
            {"type": "input_image", "image_url": self._picture(), "detail": "auto"},
            {"type": "input_text", "text": "What?"},
        ]
        return {
            "model": "tiny",
            "input": [{"role": "user", "content": content}],
            "max_output_tokens": 8,
            **fields,
        }

    async def _responses(self) -> Reply:
        return await self._post(RESPONSES, self._response())

    async def _responses_stream(self) -> Reply:
        return await self._post(RESPONSES, self._response(stream=True))

    # Left

    async def _stream_left(self) -> Reply:
        body = self._chat(stream=True, max_tokens=400, ignore_eos=True)
        path = CHAT
        if self.random.random() < 0.3:
            body, path = (
                self._response(stream=True, max_output_tokens=400, ignore_eos=True),
                RESPONSES,
            )
        return await self._leave(path, body, self.random.randrange(1, 5))

    async def _answer_left(self) -> Reply:
        body = self._chat(max_tokens=400, ignore_eos=True)
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(self._post(CHAT, body), self.random.random() / 2)
        return Reply(0)

    async def _body_left(self) -> Reply:
        address = urlsplit(self.url)
        _, writer = await asyncio.open_connection(address.hostname, address.port)
        key = self.session.headers["Authorization"]
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Authorization: {key}\r\nContent-Length: 99999\r\n\r\n"
        )
        writer.write(head.encode() + b"[" * self.random.randrange(9999))
        await writer.drain()
        await asyncio.sleep(self.random.random() / 4)
        writer.close()
        return Reply(0)

    # Hostile

    async def _key(self) -> Reply:
        key = self.random.choice(("", "Bearer", "Basic eDp4", f"Bearer {secrets.token_hex(32)}"))
        return await self._post(CHAT, self._chat(), Authorization=key)

    async def _route(self) -> Reply:
        path = self.random.choice(
            ("/v1/x", f"/v1/{secrets.token_hex(8)}", "/tokenize", "/v1/files")
        )
        return await self._post(path, self._chat())

    async def _large(self) -> Reply:
        return await self._post(CHAT, b'{"model":"tiny","x":"' + b"x" * MAX_BODY_BYTES + b'"}')

    async def _no_json(self) -> Reply:
        body = self.random.choice((
            b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 50_000, b'{"a":' * 50_000,
            b'{"model":"tiny","max_tokens":' + b"9" * 5000 + b"}",
            self.random.randbytes(1000),
        ))  # fmt: skip
        kind = self.random.choice(("application/json", "application/json", "text/plain"))
        return await self._post(CHAT, body, **{"Content-Type": kind})

    async def _bad_image(self) -> Reply:
        url = self._picture()
        bad: list[Any] = [
            url[: len(url) // 2 // 4 * 4],
            "data:image/png;base64,AAAA",
            "data:image/svg+xml;base64,PHN2Zy8+",
            "file:///etc/hostname",
            "http://127.0.0.1:1/x.png",
            "http://169.254.169.254/latest/meta-data",
            f"{self.image_url}/missing",
            f"{self.image_url}/redirect",
            "",
            5,
        ]
        return await self._post(CHAT, self._chat(messages=[self._message(self.random.choice(bad))]))

    async def _bad_field(self) -> Reply:
        word = secrets.token_hex(4)
        bad: list[dict[str, Any]] = [
            {"model": word},
            {"messages": []},
            {"messages": [{"role": "user", "content": "x" * 10_000}]},
            {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": word}]}]},
            {"messages": [{"role": "user", "content": "hi <image>"}]},
            {"max_tokens": -1},
            {"max_tokens": 10**9},
            {"n": 10**6},
            {"temperature": -1},
            {"logit_bias": {word: 1}},
            {"stop": [""]},
            {"stop_token_ids": [10**9]},
            {"tools": [{"type": word}]},
            {"tool_choice": "required"},
            {"structured_outputs": {"regex": f"({word}"}},
            {"structured_outputs": {"json": {"type": word}}},
            {"response_format": {"type": word}},
            {"himap": {"deep_ratio": 2}},
            {"himap": {word: 1}},
            {"vllm_xargs": {f"himap_{word}": 1}},
            {"vllm_xargs": {"himap_deep_ratio": -0.1}},
            {"cache_salt": 5},
            {"mm_processor_kwargs": {word: 1}},
            {"chat_template": word},
            {"use_beam_search": True},
        ]
        choice = self.random.randrange(len(bad) + 2)
        if choice < len(bad):
            return await self._post(CHAT, self._chat(**bad[choice]))
        prompt = [[IMAGE_ID], [10**6]][choice - len(bad)]
        return await self._post(TEXT, {"model": "tiny", "prompt": prompt})


@contextlib.asynccontextmanager
async def image_host() -> AsyncIterator[str]:
    """Serves a picture, different for every path, on loopback."""

    async def serve(request: web.Request) -> web.StreamResponse:
        if request.path == "/redirect":
            raise web.HTTPFound("http://127.0.0.1:1/x.png")
        if request.path == "/missing":
            raise web.HTTPNotFound
        buffer = io.BytesIO()
        noise = Random(request.path).randbytes(3 * 32 * 32)
        Image.frombytes("RGB", (32, 32), noise).save(buffer, "PNG")
        return web.Response(body=buffer.getvalue(), content_type="image/png")

    app = web.Application()
    app.router.add_get("/{path:.*}", serve)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


async def soak(
    arguments: argparse.Namespace, checkpoint: Path, work_dir: Path
) -> tuple[Traffic, list[Check]]:
    """Start the server, send everything, look at what is left."""
    key = secrets.token_hex(32)
    keys = work_dir / "soak-keys.yaml"
    digest = hashlib.sha256(key.encode()).hexdigest()
    keys.write_text(json.dumps({"keys": [{"name": "soak", "sha256": digest}]}))
    async with image_host() as images:
        flags = ["--image-hosts", urlsplit(images).netloc, "--api-keys-file", str(keys)]
        flags += ["--served-model-name", "tiny"]
        log = work_dir / "soak.log"
        progress(f"starting; the log is {log}")
        server = Gateway(checkpoint, flags, log)
        with server:
            connector = aiohttp.TCPConnector(limit=0)
            headers = {"Authorization": f"Bearer {key}"}
            async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
                traffic = Traffic(session, server.url, images, Random(arguments.seed))
                first = await _fixed_answer(traffic)
                await _send_all(server, traffic, arguments)
                checks = await _look(server, traffic, first, arguments)
    return traffic, checks


async def _fixed_answer(traffic: Traffic) -> str:
    body = {"model": "tiny", "prompt": "Once upon", "max_tokens": 16, "temperature": 0}
    async with traffic.session.post(traffic.url + TEXT, json=body) as answer:
        return str((await answer.json())["choices"][0]["text"])


async def _send_all(server: Gateway, traffic: Traffic, arguments: argparse.Namespace) -> None:
    begun = time.monotonic()
    started = 0
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # what there is by then is still reported
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)

    def over() -> bool:
        return stopped.is_set() or time.monotonic() - begun > arguments.max_seconds

    async def work() -> None:
        nonlocal started
        while started < arguments.requests and not over():
            started += 1
            await traffic.send_one()

    async def sample() -> None:
        told = 0.0
        while True:
            seconds = time.monotonic() - begun
            sizes = server.memory()
            traffic.memory.append((traffic.done, seconds, sizes))
            if seconds - told > 10:
                told = seconds
                share = traffic.done / arguments.requests
                told_sizes = ", ".join(f"{name} {size >> 20} MiB" for name, size in sizes.items())
                progress(f"{traffic.done} requests ({share:.0%}), {seconds:.0f} s: {told_sizes}")
            await asyncio.sleep(SAMPLE_SECONDS)

    sampling = asyncio.create_task(sample())
    try:
        await asyncio.gather(*(work() for _ in range(arguments.concurrency)))
    finally:
        sampling.cancel()


async def _look(
    server: Gateway, traffic: Traffic, first: str, arguments: argparse.Namespace
) -> list[Check]:
    names = ("himap_requests_in_flight", "vllm:num_requests_running", "vllm:kv_cache_usage_perc")
    deadline = time.monotonic() + IDLE_SECONDS
    while any(left := {name: server.metric(name) for name in names}.values()):
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(0.5)
    async with traffic.session.get(f"{traffic.url}/health/ready") as answer:
        ready = answer.status
    again = await _fixed_answer(traffic)
    statuses: Counter[int] = sum(traffic.outcomes.values(), Counter())
    errors = {status: number for status, number in statuses.items() if status >= 500}
    errors.pop(503, None)
    unexpected = sum(
        number
        for name, counts in traffic.outcomes.items()
        for status, number in counts.items()
        if status not in ALLOWED[name.partition(":")[0]]
    )
    checks = [
        Check("all requests were sent", traffic.done == arguments.requests, str(traffic.done)),
        Check("ready", ready == 200, str(ready)),
        Check("no request in flight or running, KV cache empty", not any(left), str(list(left))),
        Check("a good request is answered as before", again == first, ascii(again)),
        Check("no 5xx but 503", not errors, str(errors or "none")),
        Check("every answer is one that its request may have", not unexpected, str(unexpected)),
    ]
    if traffic.done < (WARM_UP + WINDOW) * arguments.requests:
        return checks  # stopped too early; the first check says so
    for process in traffic.memory[-1][2]:
        begin, end = _sizes(traffic, process, arguments.requests)
        growth = end / begin - 1
        checks.append(
            Check(
                f"{process}: at most {GROWTH_ALLOWED:.0%} larger than after the warm-up",
                growth <= GROWTH_ALLOWED,
                f"{begin / 2**20:.0f} to {end / 2**20:.0f} MiB ({growth:+.1%})",
            )
        )
    return checks


def _sizes(traffic: Traffic, process: str, requests: int) -> tuple[float, float]:
    """Median size right after the warm-up, and in the end."""

    def size(begin: float, end: float) -> float:
        return median(
            sizes[process]
            for done, _, sizes in traffic.memory
            if begin * requests <= done <= end * requests
        )

    # The end is where it ended, even if time was up before all was sent.
    reached = traffic.memory[-1][0] / requests
    return size(WARM_UP, WARM_UP + WINDOW), size(reached - WINDOW, reached)


def report(traffic: Traffic, checks: list[Check], requests: int) -> str:
    """In Markdown."""
    outcomes = [
        [name, str(sum(counts.values())), ", ".join(f"{s}: {n}" for s, n in sorted(counts.items()))]
        for name, counts in sorted(traffic.outcomes.items())
    ]
    processes = list(traffic.memory[0][2])
    memory = []
    for tenth in range(11):
        at = next((m for m in traffic.memory if m[0] >= tenth * requests / 10), traffic.memory[-1])
        sizes = [f"{at[2].get(name, 0) / 2**20:.0f}" for name in processes]
        memory.append([str(at[0]), f"{at[1]:.0f}", *sizes])
    verdicts = [[check.claim, "yes" if check.passed else "**no**", check.found] for check in checks]
    parts = [
        table(["request", "number", "statuses"], outcomes),
        table(["requests", "s", *(f"{name}, MiB" for name in processes)], memory),
        table(["check", "passed", "found"], verdicts),
    ]
    if traffic.surprises:
        parts.append("\n".join(["Surprises, the first of them:", "", *traffic.surprises]))
    return "\n\n".join(parts)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-seconds", type=float, default=3600)
    parser.add_argument("--work-dir", type=Path, help="default: a temporary directory")
    arguments = parser.parse_args()
    if arguments.requests < 300:
        parser.error("--requests: at least 300, for the samples of memory to mean something")
    work_dir = arguments.work_dir or Path(tempfile.mkdtemp(prefix="himap-soak-"))
    work_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = build_llava(work_dir / "soak-model", image_size=84)
    traffic, checks = asyncio.run(soak(arguments, checkpoint, work_dir))
    print(report(traffic, checks, arguments.requests))
    return int(not all(check.passed for check in checks))


if __name__ == "__main__":
    sys.exit(main())
