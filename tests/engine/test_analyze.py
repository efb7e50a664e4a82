# SPDX-License-Identifier: Apache-2.0
"""`himap analyze` against attention maps and blocked attention of plain transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from himap_eval import analyze
from himap_eval.analysis import probe
from himap_eval.analysis.measure import Observer

from tests.checkpoints import build_llava
from tests.engine.test_families import PICTURES, PROMPTS
from tests.engines import Case, Engine
from tests.families import TINY, every_family
from tests.oracle import Oracle
from tests.world import World

SYSTEM, IMAGE, TEXT, MARK = range(4)
ANSWER_TOKENS = 3
NUM_WINDOWS = 2


def with_methods(worker: Any) -> None:
    """What `--worker-extension-cls` does, for an engine that others started."""
    for name in ("attach", "start", "take"):
        setattr(worker, f"himap_probe_{name}", partial(getattr(probe, name), worker))


class Plain:
    """Transformers on a prompt and its answer, all maps in memory."""

    def __init__(self, checkpoint: Path, prompt: str, pictures: list[Any], answer: list[int]):
        self.oracle = Oracle(checkpoint, 2, 8)
        ids, vision = self.oracle._process(prompt, pictures)
        self.num_prompt, self.answer = len(ids), answer
        images = self.oracle._spans(ids, pictures)
        self.ids = ids + answer[:-1]
        self.start = self.oracle._embed(self.ids, vision)
        image = {place for span in images for place in span}
        # Between the tokens of an image, and what its placeholder begins and ends with.
        marks = {p for span in images for p in range(span[0], span[-1] + 1)} - image
        self.classes = torch.tensor([
            IMAGE if p in image else MARK if p in marks else SYSTEM if p < min(image) else TEXT
            for p in range(len(self.ids))
        ])  # fmt: skip

    @torch.inference_mode()
    def run(
        self, rows: tuple[int, ...] = (), layers: range = range(0), renormalized: bool = False
    ) -> tuple[list[Any], list[Any], torch.Tensor]:
        """Maps [heads, n, n] by layer, states by layer, and the answer's log-probabilities."""
        decoder, hidden = self.oracle.decoder, self.start.hidden
        positions = decoder.rotary_emb(hidden, self.start.positions.unsqueeze(-2))
        n = hidden.shape[1]
        causal = torch.full((n, n), float("-inf")).triu(1)
        hit = torch.isin(self.classes, torch.tensor(rows))[:, None] & (self.classes == IMAGE)
        maps, states = [], [(hidden, hidden)]
        for index, layer in enumerate(decoder.layers):
            before = hidden
            blocked = hit if index in layers else torch.zeros_like(hit)
            mask = causal.masked_fill(blocked & renormalized, float("-inf"))
            with zeroed(torch.zeros_like(hit) if renormalized else blocked):
                mixed, attention = layer.self_attn(
                    hidden_states=layer.input_layernorm(hidden),
                    position_embeddings=positions,
                    attention_mask=mask[None, None],
                    past_key_values=None,
                )
            hidden = hidden + mixed
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            maps.append(attention[0])
            states.append((before, hidden))
            if index < len(self.start.deepstack):
                hidden = hidden.clone()
                hidden[0, self.classes == IMAGE] += self.start.deepstack[index]
        logits = self.oracle.model.lm_head(decoder.norm(hidden[0, self.num_prompt - 1 :]))
        logprobs = logits.log_softmax(-1)[range(len(self.answer)), self.answer]
        return maps, states[1:], logprobs


@contextmanager
def zeroed(places: torch.Tensor) -> Iterator[None]:
    """Set attention to 0 at [n, n] places, behind the softmax."""
    softmax = torch.nn.functional.softmax

    def blocked(*args: Any, **kwargs: Any) -> torch.Tensor:
        return softmax(*args, **kwargs).masked_fill(places, 0.0)

    torch.nn.functional.softmax = blocked
    try:
        yield
    finally:
        torch.nn.functional.softmax = softmax


def observed(engine: Engine, case: Case) -> Any:
    engine.llm.collective_rpc(with_methods)
    observer = Observer(engine.llm, ANSWER_TOKENS)
    size = -(-observer.num_layers // NUM_WINDOWS)
    observer.windows = [(0, size), (size, observer.num_layers)]
    (prompt,) = engine.llm._preprocess_cmpl([engine.prompt(case)])
    return observer.observe(prompt), observer.windows


def close(found: Any, expected: torch.Tensor, tolerance: float = 2e-3) -> None:
    assert torch.tensor(found).flatten().tolist() == pytest.approx(
        expected.flatten().tolist(), abs=tolerance, nan_ok=True
    )


@every_family
def test_flows_and_blocked_flows_equal_plain_transformers(world: World, name: str) -> None:
    prompt, count = PROMPTS["two sizes"]
    case = Case(prompt.format(TINY[name].image), PICTURES[:count], (0, 0))
    seen, windows = observed(world.engine(name), case)
    plain = Plain(world.checkpoint(name), case.prompt, list(case.images), list(seen.answer))
    n = plain.num_prompt
    classes = plain.classes[:n]
    assert seen.counts[IMAGE] == sum(seen.image_sizes) == int((classes == IMAGE).sum())
    maps, states, logprobs = plain.run()
    for layer, attention in enumerate(maps):
        mean, entropy = attention[:, :n, :n].mean(0), torch.special.entr(attention[:, :n, :n])
        of = [classes == own for own in (IMAGE, TEXT)]
        image, text = of
        close(seen.from_text[layer], mean[text][:, image].sum(0))
        close(seen.from_image[layer], mean[image][:, image].sum(0))
        for reader, rows in zip((IMAGE, TEXT), of, strict=True):
            close(seen.mass[layer][reader][IMAGE], mean[rows][:, image].sum(), 5e-3)
            close(seen.mass[layer][reader][TEXT], mean[rows][:, text].sum(), 5e-3)
            close(seen.entropy[layer][reader], entropy.sum(-1).mean(0)[rows].mean())
        before, behind = (state[0, :n] for state in states[layer])
        cosine = torch.cosine_similarity(before, behind, dim=-1)
        close(seen.similarity[layer], torch.stack([cosine[rows].mean() for rows in of]))
    assert seen.logprob == pytest.approx(float(logprobs.sum()), abs=5e-3)
    changed = 0
    for place, (begin, end) in enumerate(windows):
        for flow, readers, layers, renormalized in (
            ("image_to_text", (TEXT,), range(begin, end), False),
            ("image_to_image", (IMAGE,), range(begin, end), False),
            ("dropped", (TEXT, MARK), range(begin, len(maps)), True),
        ):
            _, _, blocked = plain.run(readers, layers, renormalized)
            loss = float(logprobs.sum() - blocked.sum())
            assert seen.effects[flow][place].loss == pytest.approx(loss, abs=1e-2)
            changed += abs(loss) > 0.05
    assert changed > 2  # blocking does something


def test_the_command(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The analysis, and the servers by which `--check` measures its cuts and the default ones."""
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")  # these servers are not the tests' engines
    lines = []
    for number, question in enumerate(("What is this?", "Where is it?")):
        PICTURES[number].save(tmp_path / f"{number}.png")
        lines.append({"image": f"{number}.png", "question": question, "answers": "any"})
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "analysis"
    options = "--enforce-eager --dtype float32 --max-model-len 512 --kv-cache-memory-bytes 64M"
    status = analyze.main([
        str(world.checkpoint("mha12")), "--data", str(data), "--output", str(output), "--quiet",
        "--answer-tokens", "2", "--ratios", "0.25,0.75", "--check", "--", *options.split(),
    ])  # fmt: skip
    assert status == 0
    found = json.loads((output / "analysis.json").read_text())
    assert [layer["layer"] for layer in found["layers"]] == list(range(12))
    assert 0 <= found["shift_layer"] <= 12
    cuts = found["recommended"]
    assert 1 <= cuts["shallow_layer"] < cuts["deep_layer"] < 12
    # Attention of the instruction's rows to everything is theirs, and adds up to one.
    assert all(0 < layer["text_to_image"] < 1 for layer in found["layers"])
    page = (output / "analysis.html").read_text()
    assert page.count("<svg") == 6
    assert "<script" not in page
    assert "http" not in page
    assert "K1" in (output / "analysis.md").read_text()
    check = json.loads((output / "check" / "sweep.json").read_text())
    assert check["num_questions"] == len(lines)
    assert {(cell["shallow_layer"], cell["deep_layer"]) for cell in check["cells"]} == {
        (pair["shallow_layer"], pair["deep_layer"]) for pair in (cuts, found["default"])
    }
    for cell in check["cells"]:
        assert cell["ratios"] == {"shallow": 0.25, "deep": 0.75}
        assert cell["savings"]["kept_deep"] == 7  # of 36, as engines with these cuts counted


def test_a_decoder_with_a_sliding_window_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = build_llava(tmp_path / "model", num_layers=3)
    config = json.loads((path / "config.json").read_text())
    config["text_config"] |= {"sliding_window": 64, "layer_types": ["sliding_attention"] * 3}
    (path / "config.json").write_text(json.dumps(config))
    options = "--dtype float32 --max-model-len 512 --kv-cache-memory-bytes 64M"
    assert analyze.main([str(path), "--limit", "1", "--quiet", "--", *options.split()]) == 2
    assert "sliding_window, which is not supported" in capsys.readouterr().err
