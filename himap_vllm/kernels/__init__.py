# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, each with the function that launches it. Nothing here knows a model runner."""
