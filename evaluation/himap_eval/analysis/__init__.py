# SPDX-License-Identifier: Apache-2.0
"""Where visual information flows in a decoder: what `himap analyze` measures and says."""
