# SPDX-License-Identifier: Apache-2.0
"""Benchmark of stock vLLM against vLLM with pruning, side by side: `python -m bench.serve`."""
