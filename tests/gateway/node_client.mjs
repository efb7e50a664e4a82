// SPDX-License-Identifier: Apache-2.0
// The requests of test_clients.py by the Node SDK: JSON in, JSON out.
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const { baseURL, himap, chat, tools, room, response } = JSON.parse(readFileSync(0, "utf8"));
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const got = {};

got.models = (await client.models.list()).data.map((model) => model.id);
got.chat = await client.chat.completions.create({ ...chat, himap });

got.streamed = "";
const stream = await client.chat.completions.create({
  ...chat,
  himap,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  got.streamed += chunk.choices[0]?.delta?.content ?? "";
  got.streamUsage = chunk.usage ?? got.streamUsage;
}

const called = await client.chat.completions.create({
  ...chat,
  max_tokens: room,
  tools,
  tool_choice: "required",
  parallel_tool_calls: false,
});
got.tool = called.choices[0].message.tool_calls[0].function;

const { name, parameters: schema } = tools[0].function;
const parsed = await client.chat.completions.parse({
  ...chat,
  max_tokens: room,
  response_format: { type: "json_schema", json_schema: { name, schema, strict: true } },
});
got.parsed = JSON.parse(parsed.choices[0].message.content);

const answered = await client.responses.create({ ...response, himap });
got.response = { output_text: answered.output_text, usage: answered.usage };
got.responseStreamed = "";
for await (const event of await client.responses.create({ ...response, himap, stream: true })) {
  if (event.type === "response.output_text.delta") got.responseStreamed += event.delta;
}

const text = await client.completions.create({
  model: chat.model,
  prompt: "Once",
  max_tokens: chat.max_tokens,
  temperature: 0,
});
got.text = text.choices[0].text;

try {
  await client.chat.completions.create({ ...chat, himap: { deep_ratio: 0.95 } });
} catch (error) {
  got.error = { name: error.constructor.name, status: error.status, message: error.message };
}
console.log(JSON.stringify(got));
