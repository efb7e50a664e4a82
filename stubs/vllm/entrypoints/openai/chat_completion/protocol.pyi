# SPDX-License-Identifier: Apache-2.0
from typing import Any

from pydantic import BaseModel

def __getattr__(name: str) -> Any: ...

class ChatCompletionRequest(BaseModel):
    model: str | None = None
    stream: bool | None = False
    request_id: str = ...
    prompt_logprobs: int | None = None
