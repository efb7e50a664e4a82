// SPDX-License-Identifier: Apache-2.0
// Requests to the gateway. Addresses are relative, so a proxy may serve all below a path.

const here = document.baseURI.replace(/[?#].*$/, "").replace(/playground\/?$/, "");

/** The address of a path of the server. */
export const addressOf = (path) => new URL(path, here).href;

async function failure(response) {
  let text = `${response.status} ${response.statusText}`;
  try {
    const { error } = await response.json();
    text = error.message;
    if (response.status === 413 && error.param === null) text += ". Choose a smaller picture.";
  } catch {
    // no JSON: the status must do
  }
  return new Error(text);
}

async function request(path, options) {
  try {
    return await fetch(addressOf(path), options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server does not answer.");
  }
}

function headersOf(key) {
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

/** JSON of a path. */
export async function read(path, key = "") {
  const response = await request(path, { headers: headersOf(key) });
  if (!response.ok) throw await failure(response);
  return response.json();
}

/**
 * Ask for a chat completion, and hand on its text as it comes.
 * @returns the usage and the milliseconds to the first text.
 */
export async function chat(body, key, signal, onText) {
  const started = performance.now();
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: headersOf(key),
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await failure(response);
  let usage = null;
  let first = null;
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    usage = event.usage ?? usage;
    const text = event.choices?.[0]?.delta?.content;
    if (!text) continue;
    first ??= performance.now() - started;
    onText(text);
  }
  return { usage, first };
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    buffer += value;
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^(event:.*\n)?data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

const PICTURE = "himap-playground-picture";
const BEFORE = "data:image/png;base64,";

function toPython(value, indent = "") {
  const inner = `${indent}    `;
  const wrap = (open, lines, close) =>
    lines.length ? `${open}\n${lines.map((line) => `${inner}${line},\n`).join("")}${indent}${close}` : open + close;
  if (value === PICTURE) return `f"${BEFORE}{data}"`;
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return wrap("[", value.map((item) => toPython(item, inner)), "]");
  if (typeof value !== "object") return JSON.stringify(value);
  const items = Object.entries(value).map(([key, item]) => `${JSON.stringify(key)}: ${toPython(item, inner)}`);
  return wrap("{", items, "}");
}

/** A request as a shell command and as Python; the picture is read from a file. */
export function reproductions(body, hasKey) {
  const marked = JSON.parse(JSON.stringify(body, (name, value) => (name === "url" ? PICTURE : value)));
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const parts = JSON.stringify(marked, null, 2).split(PICTURE);
  const lines = parts.map((part, index) => `printf %s ${quote(part + (index < parts.length - 1 ? BEFORE : ""))}`);
  const key = hasKey ? ' -H "authorization: Bearer $API_KEY"' : "";
  const curl =
    `{\n${lines.join("\nbase64 -w0 picture.png\n")}\n} |\n` +
    `curl -sS ${addressOf("v1/chat/completions")} -H 'content-type: application/json'${key} --data-binary @-\n`;
  const { himap, ...rest } = marked;
  const given = Object.entries(rest).map(([name, value]) => `    ${name}=${toPython(value, "    ")},\n`);
  const python =
    `import base64\nimport os\nfrom pathlib import Path\n\nimport openai\n\n` +
    `data = base64.b64encode(Path("picture.png").read_bytes()).decode()\n` +
    `client = openai.OpenAI(\n    base_url=${JSON.stringify(addressOf("v1"))},\n` +
    `    api_key=os.environ.get("API_KEY", "none"),\n)\n` +
    `answer = client.chat.completions.create(\n${given.join("")}` +
    `    extra_body={"himap": ${toPython(himap, "    ")}},\n)\n` +
    `print(answer.choices[0].message.content)\nprint(answer.usage.himap)\n`;
  return { curl, python };
}
