# SPDX-License-Identifier: Apache-2.0
from typing import Any

from pydantic import BaseModel
from vllm.config import ModelConfig
from vllm.renderers import TokenizeParams

def __getattr__(name: str) -> Any: ...

class ResponsesRequest(BaseModel):
    model: str | None = None
    stream: bool | None = False
    request_id: str = ...
    instructions: str | None = None
    top_p: float | None = None
    prompt_cache_key: str | None = None
    def build_tok_params(self, model_config: ModelConfig) -> TokenizeParams: ...
