# SPDX-License-Identifier: Apache-2.0
"""The gateway: one FastAPI app that speaks the OpenAI API, with the engine in process."""
