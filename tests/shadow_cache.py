# SPDX-License-Identifier: Apache-2.0
"""A worker that stores, instead of keys and values, what these would be made from.

Each slot holds a number: a hash of all that the entry depends on in a cold run. A read that finds
another number would have found another entry.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm import SamplingParams
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request

from himap_vllm.plan.prompt import NUM_STAGES, ImageTokens, PromptPlan, Ratios, kept
from himap_vllm.plan.requests import Decision, stamp

IMAGE, MARKER, STOP = 3, 4, 5  # token ids
WORDS = (10, 11)
UNIT = 4  # tokens that hashes are made of
JUNK = -1


@dataclass
class Prompt:
    """Token ids, and images as (first token, number of tokens, identity)."""

    tokens: list[int] = field(default_factory=list)
    images: list[tuple[int, int, int]] = field(default_factory=list)

    def copy(self) -> Prompt:
        """An equal one."""
        return Prompt(list(self.tokens), list(self.images))

    def add_text(self, rng: random.Random, least: int, most: int) -> None:
        """Append some words. There are few, so that prompts share prefixes."""
        self.tokens += [rng.choice(WORDS) for _ in range(rng.randint(least, most))]

    def add_image(self, rng: random.Random) -> None:
        """Append an image. There are few."""
        identity = rng.randrange(3)
        length = 6 + 5 * identity
        self.images.append((len(self.tokens), length, identity))
        self.tokens += [IMAGE] * length

    def ends(self, votes: str) -> list[int]:
        """Where the unit of each image ends."""
        ends = []
        for start, length, _ in self.images:
            end = start + length
            if votes == "turn":
                while end < len(self.tokens) and self.tokens[end - 1] != MARKER:
                    end += 1
            ends.append(len(self.tokens) if votes == "all" else end)
        return ends


class Shadow:
    """One request, and its entries in a cold run.

    Args:
        name: of the request; its answer depends on nothing else.
        prompt: its prompt.
        salt: its cache salt.
        ratios: None: it is not pruned.
        votes: decides where units end, as `Prompt.ends` does.
    """

    def __init__(
        self, name: str, prompt: Prompt, salt: str | None, ratios: Ratios | None, votes: str
    ) -> None:
        self.name, self.prompt, self.salt, self.ratios = name, prompt, salt, ratios
        self.ends = prompt.ends(votes)
        self.sampled = 0
        self.tables: list[list[int]] = []
        self._rng = random.Random(name)
        self._tokens = list(prompt.tokens)
        self._prefix = [hash(salt)]
        self._places: list[list[int]] = [[] for _ in range(NUM_STAGES)]
        self._values: list[list[int]] = [[] for _ in range(NUM_STAGES)]
        self._contexts = [0] * NUM_STAGES
        self._add_prompt()

    @property
    def num_known(self) -> int:
        """Tokens of the prompt and of the answer so far."""
        return len(self.prompt.tokens) + self.sampled

    def token(self, place: int) -> int:
        """The sequence's token at a place; it is sampled if it is behind the prompt."""
        while len(self._tokens) <= place:
            self._tokens.append(self._rng.choice([*WORDS * 6, STOP]))
            self._add_text(len(self._tokens) - 1, self._tokens[-1])
        return self._tokens[place]

    def entries(self, stage: int, num_tokens: int) -> list[int]:
        """The entries of the first `num_tokens` tokens."""
        self.token(num_tokens - 1)
        return self._values[stage][: bisect_left(self._places[stage], num_tokens)]

    def _add_text(self, place: int, token: int) -> None:
        self._hash_token(token)
        for stage in range(NUM_STAGES):
            self._add(stage, place, (self._contexts[stage], self._prefix[-1]))

    def _hash_token(self, token: int) -> None:
        self._prefix.append(hash((self._prefix[-1], token)))

    def _add(self, stage: int, place: int, value: Any) -> None:
        self._places[stage].append(place)
        self._values[stage].append(hash((stage, value)))

    def _add_prompt(self) -> None:
        who = {
            start + i: 100 + identity
            for start, length, identity in self.prompt.images
            for i in range(length)
        }
        tokens = [who.get(i, token) for i, token in enumerate(self.prompt.tokens)]
        units: dict[int, list[tuple[int, int, int]]] = {}
        for image, end in zip(self.prompt.images, self.ends, strict=True):
            if self.ratios is not None:
                units.setdefault(end, []).append(image)
        place = 0
        for end, unit in units.items():
            for text in range(place, unit[0][0]):
                self._add_text(text, tokens[text])
            self._add_unit(unit, unit[0][0], end, tokens)
            place = end
        for text in range(place, len(tokens)):
            self._add_text(text, tokens[text])

    def _add_unit(
        self, unit: Sequence[tuple[int, int, int]], start: int, end: int, tokens: Sequence[int]
    ) -> None:
        """The rows of a unit. What survives depends on all of them."""
        for token in tokens[start:end]:
            self._hash_token(token)
        last_survives = unit[-1][0] + unit[-1][1] == len(tokens)
        assert self.ratios is not None
        ratios = (self.ratios.shallow, self.ratios.deep)
        alive = set(range(start, end))
        images = [list(range(first, first + length)) for first, length, _ in unit]
        for stage in range(NUM_STAGES):
            if stage:
                cause = (self._prefix[-1], start, end, ratios[:stage], last_survives)
                self._contexts[stage] = hash((self._contexts[stage], cause))
                rng = random.Random(hash(cause))
                for rows in images:
                    left = sorted(rng.sample(rows, kept(len(rows), ratios[stage - 1])))
                    if last_survives and rows[-1] == len(tokens) - 1:
                        left[-1] = rows[-1]
                    alive -= set(rows) - set(left)
                    rows[:] = left
            for place in sorted(alive):
                self._add(stage, place, (self._contexts[stage], self._prefix[place + 1]))

    def request(self, priority: int, max_tokens: int) -> tuple[Request, PromptPlan | None]:
        """What the scheduler gets."""
        params = SamplingParams(max_tokens=max_tokens, stop_token_ids=[STOP])
        params.update_from_generation_config({}, 0)
        if self.ratios is not None and self.prompt.images:
            stamp(params, Decision("pruned", (self.ratios,) * len(self.prompt.images)))
        request = Request(
            self.name,
            list(self.prompt.tokens),
            params,
            None,
            mm_features=[
                MultiModalFeatureSpec(None, "image", f"picture {who}", PlaceholderRange(at, length))
                for at, length, who in self.prompt.images
            ],
            cache_salt=self.salt,
            priority=priority,
            arrival_time=float(priority),
            block_hasher=get_request_block_hasher(UNIT, sha256),
        )
        return request, self._plan()

    def _plan(self) -> PromptPlan | None:
        if self.ratios is None or not self.prompt.images:
            return None
        images = tuple(ImageTokens(((at, at + n),)) for at, n, _ in self.prompt.images)
        ratios = (self.ratios,) * len(images)
        return PromptPlan(len(self.prompt.tokens), images, ratios, ends=tuple(self.ends))


class ShadowWorker:
    """Executes steps of a scheduler.

    Args:
        scheduler: of pruning.
        stages: of each KV cache group.
        sizes: tokens to a block, by stage.
        num_blocks: of the pool.
        in_flight: steps whose outputs the scheduler may not know yet.
    """

    def __init__(
        self,
        scheduler: Any,
        stages: Sequence[int],
        sizes: Sequence[int],
        num_blocks: int,
        in_flight: int,
    ) -> None:
        self.scheduler = scheduler
        self.shadows: dict[str, Shadow] = {}
        self.num_asked = self.num_found = 0  # tokens of new requests, and those of them in cache
        self._stages, self._sizes = stages, sizes
        self._memory: npt.NDArray[np.int64] = np.full((num_blocks, max(sizes)), JUNK, np.int64)
        self._in_flight = in_flight
        self._outputs: deque[tuple[Any, ModelRunnerOutput]] = deque()
        self._drafts: dict[str, list[int]] = {}
        self._rng = random.Random(0)

    def add(self, shadow: Shadow, priority: int, max_tokens: int) -> None:
        """A new request."""
        request, plan = shadow.request(priority, max_tokens)
        self.shadows[shadow.name] = shadow
        self.scheduler.add_request(request)
        if plan is not None and plan.units:
            self.scheduler.himap_plans[shadow.name] = plan

    def step(self) -> None:
        """Schedule and execute a step. The scheduler learns of the oldest one in flight."""
        output = self.scheduler.schedule()
        if output.total_num_scheduled_tokens:
            self._outputs.append((output, self._execute(output)))
        elif self._outputs:
            self._report()
        while len(self._outputs) > self._in_flight:
            self._report()

    def drain(self) -> None:
        """The scheduler learns of all steps."""
        while self._outputs:
            self._report()

    def _report(self) -> None:
        self.scheduler.update_from_output(*self._outputs.popleft())
        if self.scheduler.num_spec_tokens:
            names = [name for name in self._drafts if name in self.scheduler.requests]
            drafts = [self._drafts[name] for name in names]
            self.scheduler.update_draft_token_ids(DraftTokenIds(names, drafts))

    def _execute(self, output: Any) -> ModelRunnerOutput:
        computed = self._take_blocks(output)
        for source, target in output.kv_cache_block_copies or ():
            self._memory[target] = self._memory[source]
        names = list(output.num_scheduled_tokens)
        sampled, right = [], []
        for name in names:
            shadow, end = self.shadows[name], computed[name] + output.num_scheduled_tokens[name]
            drafts = output.scheduled_spec_decode_tokens.get(name, [])
            tokens = self._sample(shadow, end - len(drafts), drafts)
            sampled.append(tokens)
            right.append(end - len(drafts) + max(0, len(tokens) - 1))
            self._write(shadow, computed[name], right[-1], end)
        for name, num_tokens in zip(names, right, strict=True):
            self._check(self.shadows[name], num_tokens)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=sampled,
        )

    def _take_blocks(self, output: Any) -> dict[str, int]:
        """Follow the block tables as Model Runner V1 does; tokens computed of each request."""
        computed = {}
        for new in output.scheduled_new_reqs:
            self.shadows[new.req_id].tables = [list(ids) for ids in new.block_ids]
            computed[new.req_id] = new.num_computed_tokens
            self.num_found += new.num_computed_tokens
            self.num_asked += len(new.prompt_token_ids)
        cached = output.scheduled_cached_reqs
        for name, blocks, count in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            shadow = self.shadows[name]
            if name in cached.resumed_req_ids:
                shadow.tables = [list(ids) for ids in blocks]
            elif blocks is not None:
                for table, ids in zip(shadow.tables, blocks, strict=True):
                    table += ids
            computed[name] = count
        return computed

    def _sample(self, shadow: Shadow, end: int, drafts: Sequence[int]) -> list[int]:
        """The tokens behind `end`: one, and one more for each draft that is right."""
        if end < shadow.num_known:
            return []
        tokens = [shadow.token(end)]
        for draft in drafts:
            if draft != tokens[-1]:
                break
            tokens.append(shadow.token(end + len(tokens)))
        shadow.sampled += len(tokens)
        if self.scheduler.num_spec_tokens:
            known = end + len(tokens)
            guesses = [shadow.token(known + i) for i in range(self.scheduler.num_spec_tokens)]
            if self._rng.random() < 0.5:
                guesses[self._rng.randrange(len(guesses))] = STOP
            self._drafts[shadow.name] = guesses
        return tokens

    def _write(self, shadow: Shadow, start: int, right: int, end: int) -> None:
        """The chunk [start, end), of which the tokens from `right` on are wrong drafts."""
        for table, stage in zip(shadow.tables, self._stages, strict=True):
            size, values = self._sizes[stage], shadow.entries(stage, right)
            values = values[len(shadow.entries(stage, start)) :] + [JUNK] * (end - right)
            places = len(shadow.entries(stage, start)) + np.arange(len(values))
            self._memory[np.array(table)[places // size], places % size] = values

    def _check(self, shadow: Shadow, num_tokens: int) -> None:
        """All that this step's last row reads is as in a cold run."""
        for table, stage in zip(shadow.tables, self._stages, strict=True):
            size, values = self._sizes[stage], shadow.entries(stage, num_tokens)
            count = -(-len(values) // size)
            found = self._memory[table[:count], :size].reshape(-1)[: len(values)]
            assert found.tolist() == values, (shadow.name, stage, num_tokens)
