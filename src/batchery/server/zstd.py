"""Zstandard: in the standard library from Python 3.14 on, and from `backports.zstd` before, under the same names."""

from __future__ import annotations

import sys

if sys.version_info >= (3, 14):
    from compression.zstd import ZstdCompressor
else:
    from backports.zstd import ZstdCompressor

__all__ = ["ZstdCompressor"]
