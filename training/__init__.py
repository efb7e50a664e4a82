# SPDX-License-Identifier: Apache-2.0
"""Makes the next checkpoint of `himap_demo.model`, from the scenes and questions of `world`."""
