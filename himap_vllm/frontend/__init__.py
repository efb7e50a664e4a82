# SPDX-License-Identifier: Apache-2.0
"""API process: admission, support checks, the stats endpoint. Imports vLLM, not torch."""
