# SPDX-License-Identifier: Apache-2.0
"""Compiles our Triton kernels for GPUs that need not be there: `python -m tests.compile_kernels`.

Down to machine code, with Triton's own compiler. The interpreter runs what no GPU could (and has
no bfloat16); this shows that one could.
"""

from __future__ import annotations

from typing import Any

from tests import interpreter

CAPABILITIES = (80, 90, 100)  # Ampere, Hopper, Blackwell
SHARED_MEMORY = 99 << 10  # of a block, on the least of their kinds


def compile_kernel(kernel: Any, constants: dict[str, int], **pointers: str) -> None:
    """Compile with these element types behind the pointers; other arguments are int32."""
    import triton  # type: ignore[import-untyped]
    from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
    from triton.compiler import ASTSource  # type: ignore[import-untyped]

    names = kernel.arg_names
    constant_types = dict.fromkeys(constants, "constexpr")
    signature = {**dict.fromkeys(names, "i32"), **pointers, **constant_types}
    assert signature.keys() == set(names), signature.keys() ^ set(names)
    source = ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if signature[name].startswith("*")
        },
    )
    for capability in CAPABILITIES:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.metadata.shared <= SHARED_MEMORY
        print(kernel.__name__, capability, *pointers.values(), compiled.metadata.shared)


def compile_votes() -> None:
    """The kernels that score a cut."""
    import triton

    from himap_vllm.kernels import importance

    for dtype, head_size in (("bf16", 128), ("fp16", 64), ("fp32", 128), ("bf16", 80)):
        constants = {
            "NUM_FIELDS": 5,
            "HEADS_PER_KEY": 4,
            "HEAD_SIZE": head_size,
            "BLOCK_HEAD": triton.next_power_of_2(head_size),
            "BLOCK_ROWS": importance.BLOCK_ROWS,
            "BLOCK_KEYS": importance.BLOCK_KEYS,
        }
        vectors = dict.fromkeys(("query_ptr", "key_ptr"), f"*{dtype}")
        indices = dict.fromkeys(("rows_ptr", "tiles_ptr"), "*i64")
        compile_kernel(
            importance._log_totals_kernel,
            constants,
            **vectors,
            **indices,
            pages_ptr=f"*{dtype}",
            block_table_ptr="*i32",
            log_totals_ptr="*fp32",
            scale="fp32",
        )
        compile_kernel(
            importance._vote_kernel,
            constants,
            **vectors,
            **indices,
            image_tokens_ptr="*i64",
            log_totals_ptr="*fp32",
            received_ptr="*fp32",
            scale="fp32",
        )


def main() -> None:
    """Compile all kernels, for the dtypes that models have."""
    interpreter.enable()
    from triton.backends import backends  # type: ignore[import-untyped]

    from himap_vllm.kernels import gather, stage_slots

    del backends["cpu"]  # the stand-in, which has no compiler

    compile_votes()
    for num_dims in (1, 3):  # 3 with M-RoPE
        compile_kernel(
            gather._gather_kernel,
            {"NUM_DIMS": num_dims, "WIDTH": 4096, "ROWS": 1, "BLOCK": 1024},
            rows_ptr="*i64",
            hidden_ptr="*bf16",
            residual_ptr="*bf16",
            positions_ptr="*i64",
            hidden_out_ptr="*bf16",
            residual_out_ptr="*bf16",
            positions_out_ptr="*i64",
        )
    compile_kernel(
        stage_slots._stage_slots_kernel,
        {"PAD": stage_slots.PAD_SLOT, "BLOCK": 1024},
        groups_ptr="*i64",
        query_start_loc_ptr="*i32",
        seq_lens_ptr="*i32",
        block_table_ptrs="*u64",
        block_table_strides="*i64",
        block_sizes_ptr="*i32",
        slot_mappings_ptr="*i64",
    )


if __name__ == "__main__":
    main()
