# SPDX-License-Identifier: Apache-2.0
"""Which parts of a picture each cut kept: `"himap": {"trace": true}`."""
