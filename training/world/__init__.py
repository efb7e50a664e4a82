# SPDX-License-Identifier: Apache-2.0
"""Pictures and questions of the next bundled model: small objects in clutter, text, relations.

`himap_demo` has those of the model that is bundled now. These take their place with the model.
"""
