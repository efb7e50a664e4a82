# SPDX-License-Identifier: Apache-2.0
"""`/playground`: a page that asks about a picture, and shows what each cut kept of it.

The page is static, loads nothing from elsewhere, and talks to `/v1` as any client does.
"""
