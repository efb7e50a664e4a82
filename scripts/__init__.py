# SPDX-License-Identifier: Apache-2.0
"""Programs for people who work on the project; not installed."""
