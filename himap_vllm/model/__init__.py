# SPDX-License-Identifier: Apache-2.0
"""Worker process: what is changed on the loaded model."""
