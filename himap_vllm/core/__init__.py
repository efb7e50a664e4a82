# SPDX-License-Identifier: Apache-2.0
"""Engine core process: scheduler and KV cache; mirrors `vllm/v1/core`."""
