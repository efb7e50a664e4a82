# SPDX-License-Identifier: Apache-2.0
"""What can't be combined with pruning is refused at start-up, each with its own message."""

from __future__ import annotations

import importlib
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Gemma3Config

from tests.engines import IMAGE_TOKENS
from tests.quantised import FORMATS
from tests.world import World


def configure(checkpoint: Path, himap: Any, **options: Any) -> Any:
    """vLLM's configuration, as `LLM` and `vllm serve` make it first thing."""
    from vllm.engine.arg_utils import EngineArgs

    additional_config = {} if himap is None else {"himap": himap}
    defaults = {"max_model_len": 512, "dtype": "float32"}
    args = EngineArgs(
        model=str(checkpoint), additional_config=additional_config, **{**defaults, **options}
    )
    return args.create_engine_config()


def test_a_criterion_that_needs_a_positional_prior(world: World, tmp_path: Path) -> None:
    checkpoint, prior = world.checkpoint("mha12"), world.prior("mha12")
    himap = {"criterion": "uniform+debiased", "shallow_layer": 2, "deep_layer": 8}
    with pytest.raises(ValueError, match=r"needs position_prior, .*himap_prior.json is no file"):
        configure(checkpoint, himap)
    with pytest.raises(ValueError, match=r"has layers \[2, 8\], the cuts follow \[9\]"):
        configure(checkpoint, {**himap, "position_prior": str(prior), "deep_layer": 9})
    with pytest.raises(ValueError, match=r"position_prior .*README.md: it can't be read"):
        configure(checkpoint, {**himap, "position_prior": "README.md"})
    config = configure(checkpoint, {**himap, "position_prior": str(prior)})
    assert config.additional_config["himap"]["position_prior"] == str(prior)
    # Without a name, the file in the model's folder.
    (tmp_path / "model").mkdir()
    for file in checkpoint.iterdir():
        (tmp_path / "model" / file.name).symlink_to(file)
    (tmp_path / "model" / "himap_prior.json").symlink_to(prior)
    configure(tmp_path / "model", himap)


def altered(checkpoint: Path, target: Path, **changes: Any) -> Path:
    """A copy of a checkpoint's configuration files with other entries in config.json."""
    target.mkdir()
    for file in checkpoint.iterdir():
        (target / file.name).symlink_to(file)
    config = json.loads((checkpoint / "config.json").read_text())
    for key, value in changes.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_plugin_does_nothing_unless_asked(world: World) -> None:
    config = configure(world.checkpoint("mha12"), None)
    assert config.scheduler_config.scheduler_cls is None
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    config = configure(world.checkpoint("mha12"), {})
    assert config.scheduler_config.scheduler_cls == "himap_vllm.core.scheduler.PruningScheduler"
    assert config.parallel_config.worker_cls == "himap_vllm.runner.cpu_worker.PruningCPUWorker"


@pytest.mark.parametrize(
    ("himap", "options", "message"),
    [
        (
            {"shallow_layer": 8, "deep_layer": 8},
            {},
            r"deep_layer must be greater than shallow_layer \(8\), got 8",
        ),
        ({"deep_layer": 12}, {}, "deep_layer must be below the decoder's 12 layers, got 12"),
        ({"shallow_ratio": 1.5}, {}, r"shallow_ratio must be in \[0, 1\), got 1.5"),
        ({"ratio": 0.5}, {}, "unknown himap setting 'ratio'"),
        ("on", {}, "must be an object, got str"),
        ({}, {"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({}, {"disable_hybrid_kv_cache_manager": True}, "disable-hybrid-kv-cache-manager"),
        (
            {},
            {"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 2}},
            "speculative decoding but by ngram",
        ),
        (
            {},
            {
                "kv_transfer_config": {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {"shared_storage_path": "unused"},
                }
            },
            "KV connectors",
        ),
        ({}, {"kv_cache_dtype": "fp8"}, "kv_cache_dtype fp8, .* votes need .* keys"),
        ({}, {"mm_encoder_only": True}, "an encoder-only instance"),
        (
            {},
            {"ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_both"}},
            "an encoder cache connector",
        ),
        ({}, {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "--scheduler-cls"),
        ({}, {"worker_cls": "somewhere.Worker"}, "does not support the worker somewhere.Worker"),
        ({}, {"runner": "pooling", "convert": "embed"}, "pooling"),
    ],
)
def test_refusals(world: World, himap: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(world.checkpoint("mha12"), himap, **options)


@pytest.mark.parametrize(
    ("owner", "name", "value", "message"),
    [
        ("parallel_config", "ubatch_size", 2, "dual batch overlap yet: it may split"),
        ("model_config", "is_mm_prefix_lm", True, "bidirectional .* yet: scores"),
        ("aux_output_config", "enable_return_routed_experts", True, "routed-experts yet: dropped"),
    ],
)
def test_refusals_of_what_vllm_decides(
    world: World, owner: str, name: str, value: Any, message: str
) -> None:
    from himap_vllm.frontend.support import check_and_configure

    config = configure(world.checkpoint("mha12"), {})
    check_and_configure(config)
    vars(getattr(config, owner))[name] = value
    with pytest.raises(ValueError, match=message):
        check_and_configure(config)


def test_a_checkpoint_with_a_quantised_kv_cache(world: World, tmp_path: Path) -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    quantisation = {**FORMATS["w8a8-int8"].config, "kv_cache_scheme": scheme}
    checkpoint = altered(
        world.checkpoint("mha12"), tmp_path / "kv", quantization_config=quantisation
    )
    with pytest.raises(ValueError, match="kv_cache_dtype fp8, asked for or the checkpoint's"):
        configure(checkpoint, {})
    configure(checkpoint, {}, kv_cache_dtype="bfloat16")


def test_decode_context_parallelism(world: World) -> None:
    with pytest.raises(ValueError, match="context parallelism"):
        configure(
            world.checkpoint("gqa12"), {}, tensor_parallel_size=4, decode_context_parallel_size=2
        )


def test_a_gpu_takes_model_runner_v2(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.envs
    from vllm.config import VllmConfig

    from himap_vllm.frontend.support import check_and_configure

    # vLLM wants Triton for V2 and a GPU for its GPU worker: not while it configures itself, then.
    config = configure(world.checkpoint("mha12"), {})
    config.parallel_config.worker_cls = "vllm.v1.worker.gpu_worker.Worker"
    with pytest.raises(ValueError, match=r"V2 on a GPU: .* found no Triton .* install Triton"):
        check_and_configure(config)
    with monkeypatch.context() as patch:
        patch.setattr("vllm.triton_utils.HAS_TRITON", True)
        patch.setattr(
            VllmConfig, "_get_v2_model_runner_unsupported_features", lambda _: ["this", "that"]
        )
        with pytest.raises(ValueError, match=r"V2 on a GPU: .* does not support this, that"):
            check_and_configure(config)
        patch.setitem(vars(vllm.envs), "VLLM_USE_V2_MODEL_RUNNER", False)
        with pytest.raises(ValueError, match="V2 on a GPU: unset VLLM_USE_V2_MODEL_RUNNER"):
            check_and_configure(config)
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", property(lambda _: True))
    check_and_configure(config)
    worker = config.parallel_config.worker_cls
    assert worker == "himap_vllm.runner.gpu_worker.PruningGPUWorker"
    module, _, name = worker.rpartition(".")
    assert hasattr(importlib.import_module(module), name)


def test_graphs_that_a_pruning_step_would_replay(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm.envs
    from vllm.config import CUDAGraphMode

    from himap_vllm.frontend.support import check_and_configure

    config = configure(world.checkpoint("mha12"), {})
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    check_and_configure(config)
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
    with pytest.raises(ValueError, match="cudagraph_mode FULL"):
        check_and_configure(config)
    # Not in the environment, which vLLM has read for good once an engine runs.
    monkeypatch.setitem(vars(vllm.envs), "VLLM_USE_BREAKABLE_CUDAGRAPH", True)
    with pytest.raises(ValueError, match="breakable CUDA graphs"):
        configure(world.checkpoint("mha12"), {})


def test_attention_backends_that_hold_blocks_elsewhere() -> None:
    """For every criterion, also those that read no keys."""
    from himap_vllm.model.attention import install_stage

    backend = SimpleNamespace(get_name=lambda: "FLASHINFER")
    attention: Any = SimpleNamespace(attn_backend=backend, get_kv_cache_spec=None)
    unseen: Any = None  # not looked at before the refusal
    with pytest.raises(ValueError, match=r"FLASHINFER is not supported.*--attention-backend"):
        install_stage(attention, unseen, unseen)


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("VLLM_USE_RUST_FRONTEND", "the Rust frontend"),
        ("VLLM_BATCH_INVARIANT", "batch invariance .* depend on the other prompts"),
    ],
)
def test_refusals_of_variables(
    world: World, monkeypatch: pytest.MonkeyPatch, variable: str, message: str
) -> None:
    import vllm.envs

    monkeypatch.setitem(vars(vllm.envs), variable, True)
    with pytest.raises(ValueError, match=message):
        configure(world.checkpoint("mha12"), {})


def test_bitsandbytes_is_vllms_to_refuse(world: World) -> None:
    """It left vLLM before 0.32; there is nothing for the plugin to decide."""
    with pytest.raises(ValueError, match="Unknown quantization method: bitsandbytes"):
        configure(world.checkpoint("mha12"), None, quantization="bitsandbytes")


def test_another_vllm(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.34.1+cpu")
    with pytest.raises(ValueError, match=r"himap needs vLLM 0.32 or 0.33, this is 0.34.1\+cpu"):
        configure(world.checkpoint("mha12"), {})
    configure(world.checkpoint("mha12"), None)


def test_unsupported_models(world: World, tmp_path: Path) -> None:
    checkpoint = world.checkpoint("mha12")
    text_only = tmp_path / "llama"
    text_only.mkdir()
    config = json.loads((checkpoint / "config.json").read_text())["text_config"]
    config["architectures"] = ["LlamaForCausalLM"]
    (text_only / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (text_only / name).symlink_to(checkpoint / name)
    with pytest.raises(ValueError, match="does not support LlamaForCausalLM; supported: Idefics3"):
        configure(text_only, {})
    # The same engine without the setting is none of the plugin's business.
    assert configure(text_only, None).scheduler_config.scheduler_cls is None

    other = altered(checkpoint, tmp_path / "gpt2", text_config={"model_type": "gemma2"})
    with pytest.raises(ValueError, match="with a gemma2 decoder; supported: llama, mistral"):
        configure(other, {})


def test_refused_models_say_why(world: World, tmp_path: Path) -> None:
    gemma = tmp_path / "gemma3"
    gemma.mkdir()
    config = Gemma3Config(
        text_config={"num_hidden_layers": 12}, architectures=["Gemma3ForConditionalGeneration"]
    )
    config.save_pretrained(gemma)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (gemma / name).symlink_to(world.checkpoint("mha12") / name)
    with pytest.raises(ValueError, match="attend to each other in both directions"):
        configure(gemma, {})


@pytest.mark.parametrize(
    ("cuts", "warnings"),
    [
        ((2, 5), [r"cuts (2, 5) of 12 layers waste 14.3 % .* less: (2, 6), (2, 4), (1, 5)"]),
        ((2, 6), []),
    ],
)
def test_cuts_that_waste_memory_in_many_groups_are_named(
    world: World, cuts: tuple[int, int], warnings: list[str]
) -> None:
    configure(world.checkpoint("mha12"), None)  # vLLM configures logging, and drops handlers
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.himap")
    logger.addHandler(handler)
    try:
        himap = {"shallow_layer": cuts[0], "deep_layer": cuts[1], "kv_grouping": "many"}
        configure(world.checkpoint("mha12"), himap)
    finally:
        logger.removeHandler(handler)
    assert len(records) == len(warnings)
    for record, warning in zip(records, warnings, strict=True):
        assert re.search(warning.replace("(", r"\(").replace(")", r"\)"), record)


def test_cuts_follow_the_model(world: World) -> None:
    def cuts(name: str, himap: dict[str, int]) -> tuple[int, int]:
        settings = configure(world.checkpoint(name), himap).additional_config["himap"]
        return settings["shallow_layer"], settings["deep_layer"]

    assert cuts("mha32", {}) == (2, 8)
    assert cuts("mha12", {}) == (1, 3)
    assert cuts("qwen3-vl", {}) == (2, 3)  # behind two levels of deepstack
    with pytest.raises(ValueError, match="shallow_layer must be at least 2 for this model, got 1"):
        cuts("qwen3-vl", {"shallow_layer": 1})


@pytest.mark.parametrize("shape", ["mha12", "qwen2.5-vl"])  # each tells its largest image otherwise
def test_a_step_holds_the_largest_image(
    world: World, shape: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By default, and if the operator chose fewer tokens, a warning says so."""
    from himap_server.step_size import TEXT_TOKENS, EngineArgs
    from vllm.usage.usage_lib import UsageContext

    server = UsageContext.OPENAI_API_SERVER
    configure(world.checkpoint(shape), None)  # vLLM configures logging, and drops handlers
    logger = logging.getLogger("vllm.himap.server")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    caplog.set_level(logging.INFO, logger.name)

    def size(default: int, **options: Any) -> int:
        # Those of a GPU with little memory, for instance.
        defaults = {server: default}, {server: 4}
        monkeypatch.setattr(EngineArgs, "get_batch_defaults", lambda *_: defaults)
        caplog.clear()
        options = {"max_model_len": 4096, **options}
        args = EngineArgs(model=str(world.checkpoint(shape)), **options)
        found: int = args.create_engine_config(server).scheduler_config.max_num_batched_tokens
        return found

    def said() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.name == logger.name]

    assert size(2048) == 2048
    assert not said()
    assert size(256) == IMAGE_TOKENS + TEXT_TOKENS + 4
    assert f"largest image has {IMAGE_TOKENS}" in said()[0]
    assert size(32, max_model_len=40) == 40 + 4
    assert size(256, max_num_batched_tokens=64) == 64
    assert not said()
    size(2048, long_prefill_token_threshold=32)
    assert "and a prompt 32 in a step" in said()[0]
    assert size(256, max_num_batched_tokens=32) == 32
    assert f"largest image has {IMAGE_TOKENS} tokens, and a prompt 32 " in said()[0]
