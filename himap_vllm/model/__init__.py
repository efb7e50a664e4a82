# SPDX-License-Identifier: Apache-2.0
"""Worker process: changes to the loaded model."""
