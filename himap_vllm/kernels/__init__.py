# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, each with the function that launches it. They do not depend on a model runner."""
