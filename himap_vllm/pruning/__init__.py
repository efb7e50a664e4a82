# SPDX-License-Identifier: Apache-2.0
"""Worker process: one step that prunes, from scores to surviving rows, and its accounting."""
