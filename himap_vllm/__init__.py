# SPDX-License-Identifier: Apache-2.0
"""HiMAP (CVPR 2025) image-token pruning inside unmodified vLLM, as an out-of-tree plugin.

This module must not import anything: the interpreter loads `bootstrap` through it at start-up.
"""

__version__ = "0.2.0"
