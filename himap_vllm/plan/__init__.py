# SPDX-License-Identifier: Apache-2.0
"""The plan of a pruned request and of a step: integers and NumPy, in every process."""
