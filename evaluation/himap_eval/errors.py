# SPDX-License-Identifier: Apache-2.0
"""Errors that the user can correct."""


class CommandError(RuntimeError):
    """A command can't go on. The message says what to do."""
