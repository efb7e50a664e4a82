# SPDX-License-Identifier: Apache-2.0
"""What stands between a hostile request and the engine."""
