# SPDX-License-Identifier: Apache-2.0
"""Prune with OpenAI's own `detail`: one careful image beside cheap ones, without any extension.

Start `himap serve --enforce-eager` first, and run this from the root of the repository.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import openai

client = openai.OpenAI(base_url="http://localhost:8000/v1", api_key="none")
data = base64.b64encode(Path("examples/scene.png").read_bytes()).decode()


def picture(detail: str) -> Any:
    """The same picture, to be looked at more or less carefully."""
    image = {"url": f"data:image/png;base64,{data}", "detail": detail}
    return {"type": "image_url", "image_url": image}


pictures = [picture("high"), picture("low"), picture("auto")]
question: Any = {"type": "text", "text": "What color is the star?"}
answer: Any = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": [*pictures, question]}],
    max_tokens=16,
)
print(answer.choices[0].message.content)
for image in answer.usage.himap["images"]:
    kept = image["kept_shallow"], image["kept_deep"]
    print(
        f"{image['detail']}: {image['image_tokens']} image tokens, then {kept[0]}, then {kept[1]}"
    )
