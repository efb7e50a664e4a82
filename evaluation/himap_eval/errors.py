# SPDX-License-Identifier: Apache-2.0
"""What the user can put right."""


class CommandError(RuntimeError):
    """Keeps a command from its work; the message says what to do."""
