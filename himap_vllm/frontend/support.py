# SPDX-License-Identifier: Apache-2.0
"""Check that vLLM's complete configuration works with pruning."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import vllm.envs as envs
from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger

from himap_vllm import vllm_versions
from himap_vllm.config import (
    ADDITIONAL_CONFIG_KEY,
    EngineSettings,
    HiMAPError,
    is_requested,
)
from himap_vllm.frontend.features import check_features
from himap_vllm.model.families import ADDING_A_MODEL, FAMILIES, REFUSED, Family
from himap_vllm.plan.cuts import TOLERATED_WASTE, better_cuts, wasted_share
from himap_vllm.plan.prior import FILE_NAME, PositionPrior, PriorError, describe_model

logger = init_logger("vllm.himap")

_SCHEDULERS = {
    False: "himap_vllm.core.scheduler.PruningScheduler",
    True: "himap_vllm.core.scheduler.PruningAsyncScheduler",
}
_CPU_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
_GPU_WORKER = "vllm.v1.worker.gpu_worker.Worker"
_WORKERS = {
    _CPU_WORKER: "himap_vllm.runner.cpu_worker.PruningCPUWorker",
    _GPU_WORKER: "himap_vllm.runner.gpu_worker.PruningGPUWorker",
}


def check_and_configure(vllm_config: VllmConfig) -> None:
    """Choose the pruning scheduler and worker, or say why this engine cannot prune.

    Does nothing without `additional_config["himap"]`. Repeatable.

    Raises:
        HiMAPError: a setting is invalid, or a feature does not work with pruning.
    """
    if not is_requested(vllm_config.additional_config) or vllm_config.model_config is None:
        return
    if not vllm_versions.is_supported():
        raise HiMAPError(
            ADDITIONAL_CONFIG_KEY,
            f"himap needs vLLM {' or '.join(vllm_versions.SUPPORTED)}, "
            f"this is {vllm_versions.installed()}",
        )
    caution = vllm_versions.not_run()
    if caution is not None:
        logger.warning_once(caution)
    family = _family(vllm_config.model_config)
    settings = _settings(vllm_config, family)
    check_features(vllm_config)
    scheduler = vllm_config.scheduler_config
    wanted = _SCHEDULERS[bool(scheduler.async_scheduling)]
    if scheduler.scheduler_cls not in (None, *_SCHEDULERS.values()):
        raise HiMAPError(
            "scheduler_cls", "himap needs its own scheduler; --scheduler-cls can't be combined"
        )
    scheduler.scheduler_cls = wanted
    parallel = vllm_config.parallel_config
    if parallel.worker_cls not in _WORKERS.values():
        if parallel.worker_cls not in _WORKERS:
            raise HiMAPError(
                "worker_cls",
                f"himap does not support the worker {parallel.worker_cls} yet; "
                f"supported: {', '.join(_WORKERS)}",
            )
        if parallel.worker_cls == _GPU_WORKER and not vllm_config.use_v2_model_runner:
            raise HiMAPError(
                "use_v2_model_runner",
                f"himap needs Model Runner V2 on a GPU: {_why_no_v2(vllm_config)}",
            )
        parallel.worker_cls = _WORKERS[parallel.worker_cls]
    # All settings are spelled out, because vLLM's compilation cache is keyed by this value: models
    # cut at different layers must not share compiled code.
    vllm_config.additional_config = {
        **vllm_config.additional_config,
        ADDITIONAL_CONFIG_KEY: asdict(settings),
    }


def _why_no_v2(vllm_config: VllmConfig) -> str:
    """Why vLLM does not use Model Runner V2, and what helps.

    * `vllm.config.VllmConfig._get_v2_model_runner_unsupported_features` (called): the features that
      vLLM turns it off for. Remove when: `use_v2_model_runner` tells its reason.
    """
    from vllm.triton_utils import HAS_TRITON

    if envs.VLLM_USE_V2_MODEL_RUNNER is not None:
        return "unset VLLM_USE_V2_MODEL_RUNNER"
    if not HAS_TRITON:
        return "vLLM turned it off because it found no Triton that works here; install Triton"
    features = vllm_config._get_v2_model_runner_unsupported_features()
    return f"vLLM turned it off because it does not support {', '.join(features)}"


def is_configured(vllm_config: VllmConfig) -> bool:
    """Whether `check_and_configure` has made this engine a pruning one."""
    return vllm_config.scheduler_config.scheduler_cls in _SCHEDULERS.values()


def _family(model_config: ModelConfig) -> Family:
    """The row of the table that fits the model.

    Raises:
        HiMAPError: there is none.
    """
    architecture = model_config.architecture
    if architecture in REFUSED:
        raise HiMAPError("model", f"himap does not support {architecture}: {REFUSED[architecture]}")
    family = FAMILIES.get(architecture)
    if family is None:
        raise HiMAPError(
            "model",
            f"himap does not support {architecture}; supported: {', '.join(sorted(FAMILIES))}. "
            f"How to add a family: {ADDING_A_MODEL}",
        )
    decoder = model_config.hf_text_config.model_type
    if decoder not in family.decoders:
        raise HiMAPError(
            "model",
            f"himap does not support {architecture} with a {decoder} decoder; supported: "
            f"{', '.join(family.decoders)}. How to add one: {ADDING_A_MODEL}",
        )
    return family


def _settings(vllm_config: VllmConfig, family: Family) -> EngineSettings:
    model_config = vllm_config.model_config
    num_layers = model_config.hf_text_config.num_hidden_layers
    first_cut = family.first_cut(model_config.hf_config)
    settings = EngineSettings.parse(
        vllm_config.additional_config[ADDITIONAL_CONFIG_KEY], num_layers, first_cut
    )
    settings.check_depth(num_layers, first_cut)
    cuts = settings.shallow_layer, settings.deep_layer
    wasted = wasted_share(*cuts, num_layers)
    # What another grouping wastes is known when it is chosen (himap_vllm/pruning/kv_groups.py).
    if wasted > TOLERATED_WASTE and settings.kv_grouping == "many":
        logger.warning_once(
            "himap: cuts (%d, %d) of %d layers waste %.1f %% of the KV cache memory, because all "
            "KV cache groups are made as large as the smallest stage. These waste less: %s",
            *cuts,
            num_layers,
            100 * wasted,
            ", ".join(str(better) for better in better_cuts(*cuts, num_layers, first_cut)),
        )
    return _with_prior(settings, model_config)


def _with_prior(settings: EngineSettings, model_config: ModelConfig) -> EngineSettings:
    """The settings with the full path of the positional prior, if a criterion needs it.

    Raises:
        HiMAPError: there is none, or it is of another model or of other layers.
    """
    layers = settings.prior_layers
    if not layers:
        return settings
    path = Path(settings.position_prior or Path(model_config.model) / FILE_NAME)
    if not path.is_file():
        raise HiMAPError(
            "position_prior",
            f"criterion {settings.criterion} needs position_prior, a file of `himap calibrate`: "
            f"{path} is no file",
        )
    try:
        prior = PositionPrior.read(path)
        prior.check(describe_model(model_config.hf_text_config), layers)
    except PriorError as error:
        raise HiMAPError("position_prior", f"position_prior {path}: {error}") from error
    return replace(settings, position_prior=str(path.resolve()))
