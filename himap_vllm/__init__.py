# SPDX-License-Identifier: Apache-2.0
"""HiMAP (CVPR 2025) visual token pruning inside stock vLLM, as an out-of-tree plugin.

Kept free of imports on purpose: `bootstrap` is loaded from here at interpreter start-up.
"""

__version__ = "0.2.0"
