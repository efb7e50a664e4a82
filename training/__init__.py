# SPDX-License-Identifier: Apache-2.0
"""Makes the checkpoint of `himap_demo.model` from scenes and questions of `himap_demo`."""
