# SPDX-License-Identifier: Apache-2.0
"""Makes the checkpoint in `demo/model/` from nothing but `demo`'s scenes and questions."""
