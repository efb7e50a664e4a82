# SPDX-License-Identifier: Apache-2.0
"""Checks that keep hostile requests away from the engine."""
