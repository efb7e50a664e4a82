# SPDX-License-Identifier: Apache-2.0
"""The routes of the app: the OpenAI API, and the operator's."""
