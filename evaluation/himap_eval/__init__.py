# SPDX-License-Identifier: Apache-2.0
"""What pruning costs in accuracy: `himap eval`, `himap table`, `himap sweep`, `himap demo`."""
