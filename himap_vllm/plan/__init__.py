# SPDX-License-Identifier: Apache-2.0
"""What one request or step looks like when it is pruned: integers and NumPy, in every process."""
