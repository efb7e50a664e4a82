# SPDX-License-Identifier: Apache-2.0
"""`docker/verify`: the image really built, compose really started. Standard library only."""
