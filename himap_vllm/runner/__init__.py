# SPDX-License-Identifier: Apache-2.0
"""Adapters to vLLM's model runners and workers. No other module refers to those."""
