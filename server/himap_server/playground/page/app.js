// SPDX-License-Identifier: Apache-2.0
// The page: picture, question, answers side by side. Text from elsewhere (answers, file names,
// errors) is only ever set as textContent.

import { addressOf, chat, read, reproductions } from "./api.js";
import { cellAt, draw, kindsOf, middleOf, readTrace } from "./grids.js";

const find = (id) => document.getElementById(id);
const SIDES = ["pruned", "unpruned"];
const MAX_TOKENS = 256;
const KIND_NAMES = { whole: "the whole picture", tile: "the tiles", thumbnail: "the thumbnail" };

const state = {
  settings: null,
  model: null,
  key: "", // in memory only
  url: null, // of the picture, as data
  trace: null,
  tracedBy: null, // ratios of the answer that `trace` is of, as JSON
  kind: null,
  chosen: null, // {grid, cell}
  messages: { pruned: [], unpruned: [] },
  running: null, // AbortController
};

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function showError(error) {
  find("error").textContent = error === null ? "" : String(error.message ?? error);
}

// The picture ---------------------------------------------------------------------------------

function asDataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

async function take(blob, name) {
  showError(null);
  if (blob.size > state.settings.max_image_bytes) {
    const limit = Math.floor(state.settings.max_image_bytes / 2 ** 20);
    showError(`${name} is too large: this server takes pictures of at most ${limit} MiB.`);
    return;
  }
  markExample(null);
  suggest([]);
  const url = await asDataUrl(blob);
  const picture = find("picture");
  picture.src = url;
  try {
    await picture.decode();
  } catch {
    showError(`${name} is not a picture that this browser can show.`);
    return;
  }
  picture.alt = name;
  state.url = url;
  find("caption").textContent = `${name}, ${picture.naturalWidth} × ${picture.naturalHeight} pixels`;
  find("stage").hidden = false;
  // No higher than the window, and filled by the picture, so that overlay and picture agree.
  find("frame").style.maxWidth = `${(70 * picture.naturalWidth) / picture.naturalHeight}vh`;
  restart();
}

function setUpPicture() {
  find("file").addEventListener("change", ({ target }) => {
    if (target.files[0]) take(target.files[0], target.files[0].name);
    target.value = "";
  });
  const drop = find("drop");
  const files = (transfer) => [...(transfer?.files ?? [])].filter((file) => file.type.startsWith("image/"));
  for (const type of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(type, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", type === "dragover");
      const [file] = type === "drop" ? files(event.dataTransfer) : [];
      if (file) take(file, file.name);
    });
  }
  document.addEventListener("paste", (event) => {
    const [file] = files(event.clipboardData);
    if (!file) return;
    event.preventDefault();
    take(file, file.name);
  });
}

function markExample(chosen) {
  for (const button of find("examples").children) {
    button.setAttribute("aria-pressed", String(button === chosen));
  }
}

function suggest(questions) {
  find("suggestions").replaceChildren(
    ...questions.map((text) => {
      const button = element("button", text, { type: "button" });
      button.addEventListener("click", () => {
        find("question").value = text;
        find("question").focus();
      });
      return button;
    }),
  );
}

function setUpExamples() {
  state.settings.examples.forEach(({ alt, questions }, index) => {
    const button = element("button", "", { type: "button", "aria-pressed": "false" });
    const image = element("img", "", { src: addressOf(`playground/examples/${index}.png`), alt });
    button.append(image);
    button.addEventListener("click", async () => {
      const response = await fetch(image.src);
      await take(await response.blob(), `Example ${index + 1}: ${alt}`);
      markExample(button);
      suggest(questions);
      find("question").value = questions[0];
    });
    find("examples").append(button);
  });
}

// What was kept -------------------------------------------------------------------------------

const view = () => document.querySelector("input[name=view]:checked").value;

function redraw() {
  draw(find("overlay"), state.trace, view(), state.kind, state.chosen);
}

function showTrace(trace) {
  const read = readTrace(trace);
  state.trace = read;
  state.chosen = null;
  const kinds = kindsOf(state.trace);
  state.kind = kinds[0] ?? null;
  find("part").replaceChildren(...kinds.map((kind) => element("option", KIND_NAMES[kind], { value: kind })));
  find("parts").hidden = kinds.length < 2;
  find("views").hidden = kinds.length === 0;
  find("place").textContent = kinds.length
    ? "Select a part of the picture to see whether it is still there."
    : "Where image tokens lie is not known for this model.";
  if (kinds.length && view() === "picture") document.querySelector("input[value=shallow]").checked = true;
  redraw();
}

function tell(x, y) {
  const { trace } = state;
  state.chosen = trace === null ? null : cellAt(trace, state.kind, x, y);
  redraw();
  if (trace === null) return;
  const place = `Pixel (${Math.round(x)}, ${Math.round(y)})`;
  if (state.chosen === null) {
    find("place").textContent = `${place}: the model does not see this part of the picture.`;
    return;
  }
  const { grid, cell } = state.chosen;
  const row = Math.floor(cell / grid.columns) + 1;
  const fate = grid.shallow === null
    ? "the server did not tell whether it was kept"
    : !grid.shallow[cell]
    ? "dropped by the first cut"
    : grid.deep[cell]
      ? "kept by both cuts"
      : "kept by the first cut, dropped by the second";
  const score = grid.scores_shallow?.[cell];
  const scored = score === null || score === undefined ? "" : ` Score at the first cut: ${score.toPrecision(3)}.`;
  find("place").textContent = `${place}, row ${row}, column ${(cell % grid.columns) + 1}: ${fate}.${scored}`;
}

function setUpOverlay() {
  const overlay = find("overlay");
  overlay.addEventListener("click", (event) => {
    if (state.trace === null) return;
    const bounds = overlay.getBoundingClientRect();
    const x = ((event.clientX - bounds.left) / bounds.width) * state.trace.width;
    tell(x, ((event.clientY - bounds.top) / bounds.height) * state.trace.height);
  });
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Enter: [0, 0] };
  overlay.addEventListener("keydown", (event) => {
    const step = steps[event.key];
    if (!step || !state.trace?.grids.length) return;
    event.preventDefault();
    const { trace, chosen } = state;
    const { grid, cell } = chosen ?? { grid: trace.grids.find(({ kind }) => kind === state.kind), cell: 0 };
    const [x, y] = middleOf(grid, cell);
    const moved = [x + step[0] * grid.box.cell_width, y + step[1] * grid.box.cell_height];
    const target = chosen === null ? [x, y] : moved;
    if (cellAt(trace, state.kind, ...target)) tell(...target);
  });
  for (const input of document.querySelectorAll("input[name=view]")) input.addEventListener("change", redraw);
  find("part").addEventListener("change", ({ target }) => {
    state.kind = target.value;
    state.chosen = null;
    redraw();
  });
  new ResizeObserver(redraw).observe(find("picture"));
}

// Asking --------------------------------------------------------------------------------------

function restart() {
  if (state.running) {
    state.running.abort();
    state.running = null;
    setBusy(false);
  }
  state.trace = state.tracedBy = state.chosen = null;
  for (const side of SIDES) {
    state.messages[side] = [];
    find(`${side}-log`).replaceChildren();
  }
  for (const id of ["answers", "views", "restart"]) find(id).hidden = true;
  find("place").textContent = "";
  find("send").textContent = "Ask";
  redraw();
}

function himapOf(side) {
  if (side === "unpruned") return { enabled: false };
  const ratios = { shallow_ratio: Number(find("shallow").value), deep_ratio: Number(find("deep").value) };
  // A traced prompt is computed in full. An untraced one finds the picture as it was pruned before.
  const known = state.settings.choice_stays && state.tracedBy === JSON.stringify(ratios);
  return { ...ratios, ...(state.settings.traces && !known ? { trace: "scores" } : {}) };
}

function bodyOf(side, question) {
  const text = { type: "text", text: question };
  const image = { type: "image_url", image_url: { url: state.url } };
  const before = state.messages[side];
  const content = before.length ? question : [image, text];
  return {
    model: state.model,
    messages: [...before, { role: "user", content }],
    max_tokens: MAX_TOKENS,
    temperature: 0,
    himap: himapOf(side),
  };
}

async function askSide(side, question, signal) {
  const log = find(`${side}-log`);
  const body = bodyOf(side, question);
  const answer = element("p", "", { class: "assistant waiting" });
  log.append(element("p", question, { class: "user" }), answer);
  try {
    const got = await chat(body, state.key, signal, (text) => {
      answer.textContent += text;
    });
    state.messages[side] = [...body.messages, { role: "assistant", content: answer.textContent }];
    return { ...got, body };
  } finally {
    answer.classList.remove("waiting");
  }
}

async function ask() {
  const question = find("question").value.trim();
  showError(null);
  if (state.url === null) return showError("Choose a picture first.");
  if (!question) return showError("Type a question first.");
  const running = new AbortController();
  state.running = running;
  setBusy(true);
  find("answers").hidden = false;
  const done = await Promise.allSettled(SIDES.map((side) => askSide(side, question, running.signal)));
  if (state.running !== running) return; // a new conversation has begun
  state.running = null;
  setBusy(false);
  const failed = done.find(({ status }) => status === "rejected");
  if (failed && failed.reason.name !== "AbortError") showError(failed.reason);
  if (done[0].status !== "fulfilled") return;
  const [pruned, unpruned] = done.map(({ value }) => value);
  const trace = pruned.usage?.himap?.images?.[0]?.trace;
  if (trace) {
    const { shallow_ratio, deep_ratio } = pruned.body.himap;
    const told = trace.grids.every(({ kept_deep }) => kept_deep !== null);
    state.tracedBy = told ? JSON.stringify({ shallow_ratio, deep_ratio }) : null;
    showTrace(trace);
  }
  showCosts(pruned, unpruned);
  const { curl, python } = reproductions(pruned.body, state.settings.needs_key);
  find("curl").textContent = curl;
  find("python").textContent = python;
  find("question").value = "";
  find("send").textContent = "Ask a follow-up";
  find("restart").hidden = false;
}

function setBusy(busy) {
  find("send").disabled = busy;
  find("stop").hidden = !busy;
}

function showCosts(pruned, unpruned) {
  const number = (value) => (value === undefined ? "–" : value.toLocaleString("en"));
  const percent = (value) => `${Math.round(100 * value)} %`;
  const ours = pruned.usage?.himap ?? {};
  const plain = unpruned?.usage?.himap ?? {};
  const saved = (less, more) => (less === undefined || !more ? "–" : percent(1 - less / more));
  const ms = (value) => (value ? `${Math.round(value)} ms` : "–");
  const rows = [
    ["Image tokens, first layers", number(ours.image_tokens), number(plain.image_tokens), "–"],
    ["Image tokens after the first cut", number(ours.kept_shallow), number(plain.kept_shallow), saved(ours.kept_shallow, plain.kept_shallow)],
    ["Image tokens after the second cut", number(ours.kept_deep), number(plain.kept_deep), saved(ours.kept_deep, plain.kept_deep)],
    ["KV cache entries, all layers", number(ours.kv_tokens), number(ours.kv_tokens_unpruned), saved(ours.kv_tokens, ours.kv_tokens_unpruned)],
    ["Prefill FLOPs of the decoder", percent(ours.prefill_flops_ratio ?? 1), percent(1), percent(1 - (ours.prefill_flops_ratio ?? 1))],
    ["Prompt tokens found in the cache", number(ours.cached_tokens), number(plain.cached_tokens), "–"],
    ["Time to first token (both at once)", ms(pruned.first), ms(unpruned?.first), saved(pruned.first ?? undefined, unpruned?.first)],
  ];
  // A traced prompt is computed in full: its time says nothing beside one from the cache.
  if (pruned.body.himap.trace && plain.cached_tokens) rows.pop();
  find("costs").replaceChildren(
    ...rows.map(([name, ...values]) => {
      const row = element("tr", "");
      row.append(element("th", name, { scope: "row" }), ...values.map((value) => element("td", value)));
      return row;
    }),
  );
}

function setUpQuestions() {
  for (const id of ["shallow", "deep"]) {
    const show = () => {
      find(`${id}-value`).textContent = `${Math.round(100 * find(id).value)} %`;
    };
    find(id).value = state.settings[`${id}_ratio`];
    find(id).max = Math.min(0.95, state.settings[`max_${id}_ratio`] ?? 0.95);
    find(id).addEventListener("input", show);
    show();
  }
  const [first, second] = state.settings.criteria;
  const names = first === second ? first : `${first}, then ${second}`;
  find("traced").hidden = !state.settings.traces;
  if (!state.settings.choice_stays) {
    find("traced").textContent =
      "To show what was kept, each question asks for a trace. A pruned prompt with a trace is computed in full.";
  }
  find("criterion").textContent = `This server chooses by the criterion “${names}”.`;
  find("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (state.running === null) ask();
  });
  find("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    find("ask").requestSubmit();
  });
  find("stop").addEventListener("click", () => state.running?.abort());
  find("restart").addEventListener("click", restart);
  for (const button of document.querySelectorAll("[data-copy]")) {
    const label = button.textContent;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(find(button.dataset.copy).textContent);
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = label), 1500);
    });
  }
}

async function connect() {
  try {
    const { data } = await read("v1/models", state.key);
    state.model = data[0].id;
    find("model").textContent = state.model;
    showError(null);
  } catch (error) {
    find("model").textContent = state.settings.needs_key ? "Needs an API key" : "Not connected";
    if (state.key || !state.settings.needs_key) showError(error);
  }
  find("send").disabled = state.model === null;
}

async function start() {
  try {
    state.settings = await read("playground/settings.json");
  } catch (error) {
    return showError(error);
  }
  find("key-form").hidden = !state.settings.needs_key;
  find("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    state.key = find("key").value.trim();
    state.model = null;
    connect();
  });
  setUpPicture();
  setUpExamples();
  setUpOverlay();
  setUpQuestions();
  await connect();
}

start();
