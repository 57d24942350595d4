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
let curve = []; // [position, resident bytes], as measured
let chosen = -1; // position of the token that the arrow keys are at

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
  if (/[^ -~]/.test(key)) throw new Error("the API key has characters that no header can carry: type it again");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  while (count >= 1024 && unit < 3) [count, unit] = [count / 1024, unit + 1];
  return `${unit ? count.toFixed(1) : count} ${units[unit]}`;
}

const number = (value) => Math.round(value).toLocaleString("en");

// Keeps the end in view, unless somebody reads further up.
function growing(box, change) {
  const follow = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  change();
  if (follow) box.scrollTop = box.scrollHeight;
}

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
  at("log").setAttribute("aria-busy", on); // an answer is read out when it is whole, not at each word
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
  const said = chat.messages.filter((message) => message.role !== "system");
  const system = at("system").value.trim();
  if (said.length === 1) chat.messages = system ? [{ role: "system", content: system }, ...said] : said;
  keep();
  return JSON.stringify({
    model: settings.model,
    messages: chat.messages,
    conversation: chat.id,
    max_tokens: Number(at("max-tokens").value || 256),
    temperature: Number(at("temperature").value || 0),
    stream: true,
    stream_options: { include_usage: true },
  });
}

// Answers the newest message.
async function answer() {
  trouble("");
  working = new AbortController();
  busy(true);
  watch(working);
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
      growing(at("log"), () => words.append(text));
    }
  } catch (error) {
    // Browsers tell of broken connections by this type, each in its own words.
    const gone = error instanceof TypeError;
    problem = gone ? "the server cannot be reached: see whether it still runs" : error.message || String(error);
    if (error.name === "AbortError") problem = "";
  }
  const seconds = first ? (performance.now() - first) / 1000 : 0;
  working = null;
  busy(false);
  if (problem || (!said && !usage)) {
    box.remove();
    trouble(problem || "stopped before the first word");
  } else {
    chat.messages.push({ role: "assistant", content: said });
    let cost = "stopped";
    if (usage) {
      const old = usage.prompt_tokens_details.cached_tokens;
      const speed = seconds > 0.05 ? `, ${number((usage.completion_tokens - 1) / seconds)} tokens/s` : "";
      cost = `read ${number(usage.prompt_tokens - old)} new tokens, ${number(old)} were held${speed}`;
    }
    growing(at("log"), () => box.append(make("span", "cost", cost)));
    keep();
  }
  at("message").focus();
  await looking;
  if (!problem) await look();
}

function send() {
  const text = at("message").value;
  if (!text.trim() || working) return;
  if (chat.messages.at(-1)?.role === "user") {
    // It got no answer, and is asked in other words now.
    chat.messages.pop();
    at("log").lastElementChild.remove();
  }
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
  chosen = -1;
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

// Looks interrupt the answer, so they may take a twentieth of its time at most.
async function watch(answering) {
  while (working === answering) {
    await new Promise((done) => setTimeout(done, Math.max(POLL_MS, 20_000 * (memory?.look_s || 0))));
    if (working === answering) await look();
  }
}

async function fetchMemory() {
  const asked = chat.id;
  try {
    const reply = await fetch(`memory?conversation=${encodeURIComponent(asked)}`, { headers: headers() });
    const view = reply.ok ? await reply.json() : null;
    if (asked !== chat.id || (!reply.ok && reply.status !== 404)) return;
    memory = view;
    if (memory) note(memory.position, memory.rss_bytes);
    drawMemory();
  } catch {
    // The answer itself tells when the server is gone.
  }
}

function note(position, size) {
  if (curve.length && curve.at(-1)[0] > position) curve = []; // read anew
  if (curve.length && curve.at(-1)[0] === position) curve.pop();
  curve.push([position, size]);
  if (curve.length > 600) curve = curve.filter((_, index) => index % 2 === 0);
}

function drawMemory() {
  const empty = !memory || !memory.position;
  const live = empty ? 0 : memory.live_entries;
  const most = memory ? memory.max_entries : 0;
  at("fill").style.width = most ? `${(100 * live) / most}%` : "0";
  at("bar").setAttribute("aria-valuemax", most || 1);
  at("bar").setAttribute("aria-valuenow", live);
  const nothing = chat.messages.some((message) => message.role === "assistant")
    ? "no session holds this chat now: the next message makes it be read again"
    : "nothing was read yet";
  at("entries").textContent = empty
    ? nothing
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
  pen.strokeStyle = style.getPropertyValue("--line");
  pen.strokeRect(0.5, 0.5, width - 1, height - 1);
  at("curve-range").textContent = curve.length ? "" : "not measured yet";
  if (!curve.length) return;
  const sizes = curve.map((point) => point[1]);
  const [least, most, end] = [Math.min(...sizes), Math.max(...sizes), curve.at(-1)[0]];
  const span = curve.length > 1 ? `tokens ${number(curve[0][0])} to ${number(end)}` : `token ${number(end)}`;
  const range = most > least ? `${bytes(least)} to ${bytes(most)}` : bytes(most);
  at("curve-range").textContent = `${range} at ${span}; the scale begins at 0`;
  const x = (position) => 4 + ((width - 8) * position) / (end || 1);
  const place = ([position, size]) => [x(position), height - (height * size) / (most * 1.25)];
  pen.strokeStyle = pen.fillStyle = style.getPropertyValue("--accent");
  pen.lineWidth = 2;
  pen.beginPath();
  for (const point of curve) pen.lineTo(...place(point));
  pen.stroke();
  pen.beginPath();
  pen.arc(...place(curve.at(-1)), 3, 0, 2 * Math.PI);
  pen.fill();
}

function drawHeads() {
  const kind = document.querySelector("input[name=heads]:checked").value;
  const table = memory && memory.position ? memory[kind] : [];
  const values = table.flat();
  const [unit, full] = kind === "entries" ? ["entries", memory?.max_entries] : ["tokens old on average", 0];
  const most = Math.max(1, full || 0, ...values);
  const line = (title, scope, cells) => {
    const row = make("tr");
    row.append(make("th", "", title), ...cells);
    row.firstChild.scope = scope;
    return row;
  };
  const above = table.map((_, layer) => {
    const cell = make("th", layer % 4 ? "skip" : "", String(layer));
    cell.scope = "col";
    return cell;
  });
  const rows = (table[0] || []).map((_, head) =>
    line(
      `head ${head}`,
      "row",
      table.map((row, layer) => {
        const cell = make("td", `s${shade(row[head] / most)}`, number(row[head]));
        cell.title = `layer ${layer}, head ${head}: ${number(row[head])} ${unit}`;
        return cell;
      }),
    ),
  );
  at("heads").className = table.length > 8 ? "many" : "";
  at("heads").tHead.replaceChildren(...(rows.length ? [line("layer", "row", above)] : []));
  at("heads").tBodies[0].replaceChildren(...rows);
  const [low, high] = [number(Math.min(...values)), number(Math.max(...values))];
  const range = low === high ? `${low} ${unit} in each` : `${low} to ${high} ${unit}`;
  at("heads-scale").textContent = rows.length ? `${range}; the strongest shade is ${number(most)}` : "";
}

const shade = (share) => Math.max(1, Math.ceil(Math.min(1, share) * 5));

function drawText() {
  const nodes = [];
  const gap = (from, to) => {
    const node = make("span", "gap", "⋯");
    const where = to > from ? `positions ${number(from)} to ${number(to)} were` : `position ${number(from)} was`;
    node.dataset.tells = `${where} evicted everywhere`;
    nodes.push(node);
  };
  const view = memory && memory.position ? memory : { tokens: [], older: 0 };
  let next = 0;
  if (view.older) {
    nodes.push(make("span", "gap", `${number(view.older)} older tokens are held too ⋯ `));
    next = view.tokens[0][0];
  }
  for (const [position, text, share] of view.tokens) {
    if (position > next && at("gaps").checked) gap(next, position - 1);
    next = position + 1;
    const node = make("span", `t s${shade(share)}`, text || "▯");
    node.dataset.position = position;
    node.dataset.tells = `position ${number(position)}: held by ${Math.round(100 * share)} % of the heads`;
    node.classList.toggle("chosen", position === chosen);
    nodes.push(node);
  }
  growing(at("text"), () => at("text").replaceChildren(...nodes));
}

function tell(node) {
  const tells = node.dataset.tells;
  if (tells) at("token").textContent = node.dataset.position ? `${JSON.stringify(node.textContent)}, ${tells}` : tells;
}

at("text").addEventListener("mouseover", (event) => tell(event.target));
// The arrow keys go from token to token, from the newest on.
at("text").addEventListener("keydown", (event) => {
  const tokens = [...at("text").querySelectorAll(".t")];
  const now = tokens.findIndex((node) => Number(node.dataset.position) === chosen);
  const last = tokens.length - 1;
  const start = now < 0;
  const to = { ArrowRight: start ? last : now + 1, ArrowLeft: start ? last : now - 1, Home: 0, End: last }[event.key];
  if (to === undefined || last < 0) return;
  event.preventDefault();
  const node = tokens[Math.min(last, Math.max(0, to))];
  tokens[now]?.classList.remove("chosen");
  node.classList.add("chosen");
  chosen = Number(node.dataset.position);
  node.scrollIntoView({ block: "nearest" });
  tell(node);
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
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCurve); // a canvas keeps its colours

at("key-label").hidden = !settings.needsKey;
at("settings").open = settings.needsKey;
for (const message of chat.messages) if (message.role !== "system") show(message);
drawMemory();
if (chat.messages.length) look();
if (chat.messages.at(-1)?.role === "user") trouble("the last message has no answer yet");
at("message").focus();
