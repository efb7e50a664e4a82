# SPDX-License-Identifier: Apache-2.0
from abc import ABC
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")

def __getattr__(name: str) -> Any: ...

class MediaIO(ABC, Generic[_T]):
    def load_bytes(self, data: bytes) -> _T: ...
