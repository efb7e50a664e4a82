# SPDX-License-Identifier: Apache-2.0
"""Quantised copies of a checkpoint, each beside the float weights that it stands for.

The linear layers of the decoder are rounded to nearest, in the tensors and the `config.json` entry
that the tools which make such checkpoints write. No calibration: the tests ask whether the engine
runs the format, not how well it answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GROUP = 32  # inputs that share a scale in the 4-bit formats
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output channels in an int32, from its low end
UNTOUCHED = ["re:.*vision_tower.*", "re:.*multi_modal_projector.*", "re:.*lm_head"]

Tensors = dict[str, torch.Tensor]
Quantise = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
"""Weight [out, in] float32 -> (tensors of the format, the weight that they stand for)."""


@dataclass(frozen=True)
class Format:
    """A quantised format.

    Attributes:
        quantise: one weight.
        config: the checkpoint's `quantization_config`.
        activations: whether the engine rounds the inputs of linear layers, too.
    """

    quantise: Quantise
    config: dict[str, Any]
    activations: bool = False


def pack(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Eight 4-bit values along `dim` to an int32, the first in its low bits."""
    parts = values.to(torch.int64).unflatten(dim, (-1, 8)).movedim(dim + 1, 0)
    words = sum(part << (4 * i) for i, part in enumerate(parts))
    assert isinstance(words, torch.Tensor)
    return words.to(torch.int32).contiguous()  # keeps the low 32 bits


def symmetric(weight: torch.Tensor, top: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` [..., n] over its scales [..., 1], which bring it to +-`top`."""
    scales = (weight.abs().amax(-1, keepdim=True) / top).half().float()
    return weight / scales, scales


def gptq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """AutoGPTQ: packed along the inputs; symmetric, so every zero is 8, stored less one."""
    levels, scales = symmetric(weight.unflatten(1, (-1, GROUP)), 7)
    levels = levels.round()
    values = levels.flatten(1).T + 8  # [in, out]
    zeros = torch.full((len(values) // GROUP, len(weight)), 7)
    tensors = {
        "qweight": pack(values, 0),
        "qzeros": pack(zeros, 1),
        "scales": scales[..., 0].T.half().contiguous(),
        "g_idx": torch.arange(len(values), dtype=torch.int32) // GROUP,
    }
    return tensors, (levels * scales).flatten(1)


def awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """AutoAWQ: packed along the outputs, in an order of its own; a zero per group."""
    groups = weight.unflatten(1, (-1, GROUP))  # [out, groups, GROUP]
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True)
    scales = ((high - low) / 15).half().float()
    zeros = (-low / scales).round().clamp(0, 15)
    values = (groups / scales + zeros).round().clamp(0, 15)

    def packed(rows: torch.Tensor) -> torch.Tensor:
        return pack(rows.unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1), 1)

    tensors = {
        "qweight": packed(values.flatten(1).T),
        "qzeros": packed(zeros[..., 0].T),
        "scales": scales[..., 0].T.half().contiguous(),
    }
    return tensors, ((values - zeros) * scales).flatten(1)


def packed_int4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors `pack-quantized`: packed along the inputs, outputs first."""
    levels, scales = symmetric(weight.unflatten(1, (-1, GROUP)), 7)
    levels = levels.round()
    tensors = {
        "weight_packed": pack(levels.flatten(1) + 8, 1),
        "weight_scale": scales[..., 0].half(),
        "weight_shape": torch.tensor(weight.shape),
    }
    return tensors, (levels * scales).flatten(1)


def int8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors `int-quantized`: a scale per output channel."""
    levels, scales = symmetric(weight, 127)
    levels = levels.round()
    return {"weight": levels.to(torch.int8), "weight_scale": scales}, levels * scales


def fp8_channels(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors `float-quantized`: E4M3, a scale per output channel."""
    levels, scales = symmetric(weight, 448)
    levels8 = levels.clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": levels8, "weight_scale": scales}, levels8.float() * scales


def _compressed(name: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> Any:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "ignore": UNTOUCHED,
        "config_groups": {"group_0": group},
    }


def _args(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}


FORMATS: dict[str, Format] = {
    "gptq": Format(
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    ),
    "awq": Format(
        awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["vision_tower", "multi_modal_projector", "lm_head"],
        },
    ),
    "w4a16": Format(
        packed_int4,
        _compressed("pack-quantized", _args(4, "int", "group", group_size=GROUP), None),
    ),
    "w8a8-int8": Format(
        int8,
        _compressed(
            "int-quantized", _args(8, "int", "channel"), _args(8, "int", "token", dynamic=True)
        ),
        activations=True,
    ),
    "w8a8-fp8": Format(
        fp8_channels,
        _compressed(
            "float-quantized",
            _args(8, "float", "channel"),
            _args(8, "float", "token", dynamic=True),
        ),
        activations=True,
    ),
}


def quantise(source: Path, form: Format, target: Path, rounded: Path) -> None:
    """Write `source` quantised to the directory `target`, and dequantised to `rounded`."""
    quantised: Tensors = {}
    floats: Tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if name.startswith("language_model.model.layers") and name.endswith("proj.weight"):
            tensors, floats[name] = form.quantise(weight.float())
            prefix = name.removesuffix("weight")
            quantised |= {prefix + kind: tensor for kind, tensor in tensors.items()}
        else:
            quantised[name] = floats[name] = weight
    config = json.loads((source / "config.json").read_text())
    for directory, weights, more in (
        (target, quantised, {"quantization_config": form.config}),
        (rounded, floats, {}),
    ):
        directory.mkdir(parents=True)
        for file in source.iterdir():
            if file.name not in ("model.safetensors", "config.json"):
                (directory / file.name).symlink_to(file)
        (directory / "config.json").write_text(json.dumps({**config, **more}))
        contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt"})
