# SPDX-License-Identifier: Apache-2.0
"""Stock vLLM against vLLM with pruning on one GPU: `python -m bench.gpu`; see README.md."""
