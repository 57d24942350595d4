"use strict";
// Text of models and of people goes into the page as text only, never as HTML.
const settings = JSON.parse(document.body.dataset.settings);
const at = (id) => document.getElementById(id);
const make = (tag, kind, text) => {
  const node = document.createElement(tag);
  if (kind) node.className = kind;
  if (text !== undefined) node.textContent = text;
  return node;
};
const STORED = "trimkv-chat"; // of this tab only
const POLL_MS = 250;
let chat = restored();
let working = null; // AbortController of the answer that is being made
let memory = null; // newest view
let curve = []; // [position, resident bytes]

function fresh() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return { id: Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join(""), messages: [] };
}

function restored() {
  try {
    const found = JSON.parse(sessionStorage.getItem(STORED));
    return found && Array.isArray(found.messages) && found.id ? found : fresh();
  } catch {
    return fresh();
  }
}

function keep() {
  try {
    sessionStorage.setItem(STORED, JSON.stringify(chat));
  } catch {
    // Without storage the chat ends with the page.
  }
}

function headers() {
  const key = at("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  while (count >= 1024 && unit < 3) [count, unit] = [count / 1024, unit + 1];
  return `${unit ? count.toFixed(1) : count} ${units[unit]}`;
}

const number = (value) => Math.round(value).toLocaleString("en");

// ---- the chat

function show(message, cost) {
  at("empty").hidden = true;
  const box = make("div", `said ${message.role}`);
  box.append(make("span", "who", message.role === "user" ? "you" : settings.model));
  const words = make("span", "words", message.content);
  box.append(words);
  if (cost) box.append(make("span", "cost", cost));
  at("log").append(box);
  at("log").scrollTop = at("log").scrollHeight;
  return { box, words };
}

function trouble(text) {
  at("trouble").hidden = !text;
  at("trouble-text").textContent = text || "";
}

function busy(on) {
  at("send").disabled = on;
  at("stop").disabled = !on;
  at("new").disabled = on;
  at("state").textContent = on ? "reading" : "ready";
}

async function failure(reply) {
  let text = `the server said ${reply.status}`;
  try {
    text = (await reply.json()).error.message;
  } catch {
    // Not in the error form: the status has to do.
  }
  if (reply.status === 401) at("settings").open = true;
  const wait = reply.headers.get("Retry-After");
  return wait ? `${text} (in ${wait} s)` : text;
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
  }
}

function request() {
  const system = at("system").value.trim();
  if (system && chat.messages[0].role === "user" && chat.messages.length === 1) {
    chat.messages.unshift({ role: "system", content: system });
  }
  return JSON.stringify({
    model: settings.model,
    messages: chat.messages,
    conversation: chat.id,
    max_tokens: Number(at("max-tokens").value) || 256,
    temperature: Number(at("temperature").value) || 0,
    stream: true,
    stream_options: { include_usage: true },
  });
}

// Answers the newest message.
async function answer() {
  trouble("");
  working = new AbortController();
  busy(true);
  const watching = setInterval(look, POLL_MS);
  const { box, words } = show({ role: "assistant", content: "" });
  let said = "";
  let problem = "";
  let usage = null;
  let first = 0;
  try {
    const options = { method: "POST", headers: headers(), body: request(), signal: working.signal };
    const reply = await fetch("v1/chat/completions", options);
    if (!reply.ok) throw new Error(await failure(reply));
    for await (const event of events(reply.body)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) usage = event.usage;
      const text = event.choices?.[0]?.delta?.content;
      if (!text) continue;
      first ||= performance.now();
      at("state").textContent = "answering";
      said += text;
      words.textContent = said;
      at("log").scrollTop = at("log").scrollHeight;
    }
  } catch (error) {
    problem = error.name === "AbortError" ? "" : error.message || String(error);
  }
  clearInterval(watching);
  const seconds = first ? (performance.now() - first) / 1000 : 0;
  working = null;
  busy(false);
  if (problem || (!said && !usage)) {
    box.remove();
    trouble(problem || "stopped before the first word");
  } else {
    chat.messages.push({ role: "assistant", content: said });
    if (usage) {
      const old = usage.prompt_tokens_details.cached_tokens;
      const speed = seconds > 0.05 ? `, ${number((usage.completion_tokens - 1) / seconds)} tokens/s` : "";
      const cost = `read ${number(usage.prompt_tokens - old)} new tokens, ${number(old)} were held${speed}`;
      box.append(make("span", "cost", cost));
    } else {
      box.append(make("span", "cost", "stopped"));
    }
    keep();
  }
  at("log").scrollTop = at("log").scrollHeight;
  await looking;
  await look();
  at("message").focus();
}

function send() {
  const text = at("message").value;
  if (!text.trim() || working) return;
  if (!at("trouble").hidden && chat.messages.at(-1)?.role === "user") chat.messages.pop(); // asked in other words
  at("message").value = "";
  chat.messages.push({ role: "user", content: text });
  show(chat.messages.at(-1));
  keep();
  answer();
}

function begin() {
  chat = fresh();
  curve = [];
  memory = null;
  keep();
  at("log").querySelectorAll(".said").forEach((node) => node.remove());
  at("empty").hidden = false;
  trouble("");
  drawMemory();
  at("message").focus();
}

// ---- the memory

let looking = null;
// One request at a time; what comes in the meantime waits for the next one.
function look() {
  looking ||= fetchMemory().finally(() => {
    looking = null;
  });
  return looking;
}

async function fetchMemory() {
  try {
    const reply = await fetch(`memory?conversation=${encodeURIComponent(chat.id)}`, { headers: headers() });
    if (reply.ok) {
      memory = await reply.json();
      const last = curve.at(-1);
      if (last && last[0] > memory.position) curve = [];
      if (!last || last[0] !== memory.position) curve.push([memory.position, memory.rss_bytes]);
      if (curve.length > 600) curve = curve.filter((_, index) => index % 2);
      drawMemory();
    }
  } catch {
    // The answer itself tells when the server is gone.
  }
}

function drawMemory() {
  const empty = !memory || !memory.position;
  const live = empty ? 0 : memory.live_entries;
  const most = memory ? memory.max_entries : 0;
  at("fill").style.width = most ? `${(100 * live) / most}%` : "0";
  at("bar").setAttribute("aria-valuemax", most);
  at("bar").setAttribute("aria-valuenow", live);
  at("entries").textContent = empty
    ? "nothing was read yet"
    : `${number(live)} of ${number(most)} entries in each head, after ${number(memory.position)} tokens`;
  const speed = (value) => (value ? `${number(value)} tokens/s` : "-");
  const facts = empty
    ? []
    : [
        ["cache, fixed", bytes(memory.cache_bytes)],
        ["process", bytes(memory.rss_bytes)],
        ["evictions", `${number(memory.events)} events`],
        ["reading", speed(memory.prefill_tokens_per_s)],
        ["writing", speed(memory.decode_tokens_per_s)],
        ["positions left", number(memory.position_limit - memory.position)],
      ];
  at("facts").replaceChildren(
    ...facts.map(([name, value]) => {
      const pair = make("div");
      pair.append(make("dt", "", name), make("dd", "", value));
      return pair;
    }),
  );
  drawCurve();
  drawHeads();
  drawText();
}

function drawCurve() {
  const canvas = at("curve");
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  [canvas.width, canvas.height] = [width * ratio, height * ratio];
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const style = getComputedStyle(document.documentElement);
  const label = "Memory of the process over the stream";
  canvas.setAttribute(
    "aria-label",
    curve.length ? `${label}: ${bytes(curve.at(-1)[1])} after ${number(curve.at(-1)[0])} tokens` : `${label}: nothing yet`,
  );
  pen.strokeStyle = style.getPropertyValue("--line");
  pen.strokeRect(0.5, 0.5, width - 1, height - 1);
  if (!curve.length) return;
  const most = Math.max(...curve.map((point) => point[1])) * 1.25; // from 0, so that flat looks flat
  const end = curve.at(-1)[0];
  pen.strokeStyle = style.getPropertyValue("--accent");
  pen.lineWidth = 2;
  pen.beginPath();
  for (const [position, size] of [[0, curve[0][1]], ...curve]) {
    pen.lineTo(2 + ((width - 4) * position) / end, height - (height * size) / most);
  }
  pen.stroke();
}

function drawHeads() {
  const kind = document.querySelector("input[name=heads]:checked").value;
  const table = memory && memory.position ? memory[kind] : [];
  const most = Math.max(1, ...table.flat());
  const unit = kind === "entries" ? "entries" : "tokens old on average";
  at("heads").className = table.length * (table[0]?.length || 0) > 64 ? "many" : "";
  const rows = table.map((row, layer) => {
    const line = make("tr");
    const head = make("th", "", `layer ${layer}`);
    head.scope = "row";
    line.append(head);
    row.forEach((value, index) => {
      const cell = make("td", `s${shade(value / most)}`, number(value));
      cell.title = `layer ${layer}, head ${index}: ${number(value)} ${unit}`;
      line.append(cell);
    });
    return line;
  });
  at("heads").tBodies[0].replaceChildren(...rows);
  at("heads-scale").textContent = table.length ? `darkest: ${number(most)} ${unit}` : "";
}

const shade = (share) => Math.max(1, Math.ceil(Math.min(1, share) * 5));

function drawText() {
  const box = at("text");
  const below = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  const nodes = [];
  let last = -1;
  if (memory && memory.position) {
    if (memory.older) nodes.push(make("span", "gap", `${number(memory.older)} older tokens are held too · `));
    for (const [position, text, share] of memory.tokens) {
      if (last >= 0 && position > last + 1 && at("gaps").checked) nodes.push(make("span", "gap", "·"));
      last = position;
      const node = make("span", `t s${shade(share)}`, text || "▯");
      node.dataset.tells = `position ${number(position)}: held by ${Math.round(100 * share)} % of the heads`;
      nodes.push(node);
    }
  }
  box.replaceChildren(...nodes);
  if (below) box.scrollTop = box.scrollHeight;
}

at("text").addEventListener("mouseover", (event) => {
  at("token").textContent = event.target.dataset.tells || "";
});
// The arrow keys go from token to token.
let chosen = -1;
at("text").addEventListener("keydown", (event) => {
  const tokens = at("text").querySelectorAll(".t");
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step || !tokens.length) return;
  event.preventDefault();
  chosen = Math.min(tokens.length - 1, Math.max(0, chosen + step));
  tokens[chosen].scrollIntoView({ block: "nearest" });
  at("token").textContent = `${JSON.stringify(tokens[chosen].textContent)}, ${tokens[chosen].dataset.tells}`;
});

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
at("stop").addEventListener("click", () => working?.abort());
at("retry").addEventListener("click", () => answer());
at("new").addEventListener("click", begin);
at("gaps").addEventListener("change", drawText);
document.querySelectorAll("input[name=heads]").forEach((radio) => radio.addEventListener("change", drawHeads));
window.addEventListener("resize", drawCurve);

at("key-label").hidden = !settings.needsKey;
at("settings").open = settings.needsKey;
for (const message of chat.messages) if (message.role !== "system") show(message);
drawMemory();
if (chat.messages.length) look();
at("message").focus();
