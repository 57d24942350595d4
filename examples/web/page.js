// The page: reads a prompt, streams the answer, and shows that memory stays as it is.
import { wasmBytes } from "./memory.js"; // before onnxruntime, whose memory it measures
import * as ort from "onnxruntime-web/wasm";
import { Session } from "./session.js";
import { Text } from "./text.js";

const LONGEST_LOG = 20_000; // characters: the page itself must not grow either
const POINTS = 200; // of the chart
const at = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en");
const size = (bytes) => `${(bytes / 2 ** 20).toFixed(1)} MiB`;
let session, text, running = false, stopping = false, started = true, points = [], rate = null, drawing = false;

// Lets the browser draw and take clicks; setTimeout would wait 4 ms.
const pause = () => new Promise((done) => {
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = () => { port1.close(); done(); };
  port2.postMessage(null);
});

function show(state, error) {
  at("state").textContent = state;
  at("trouble").hidden = !error;
  at("trouble").textContent = error ? String(error.message ?? error) : "";
  at("send").disabled = running || !session;
  at("new").disabled = running || !session;
  at("folder").disabled = running;
  at("stop").disabled = !running;
  draw();
}

async function open(load) {
  session = text = undefined;
  show("loading");
  try {
    const opened = await Session.open(ort, load);
    text = await Text.open(load, opened.manifest);
    session = opened;
    at("model").textContent = session.manifest.model.name;
    const chat = text.template !== null;
    document.querySelector("input[value=message]").disabled = !chat;
    document.querySelector(`input[value=${chat ? "message" : "text"}]`).checked = true;
    restart();
    show("ready");
  } catch (error) {
    show("no artefact", error);
  }
}

function restart() {
  session.reset();
  started = true;
  points = [];
  rate = null;
  at("log").replaceChildren();
}

function draw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    if (session) measure();
  });
}

function measure() {
  const { cache, manifest: { model } } = session, entry = 8 * model.num_layers * model.num_kv_heads * model.head_dim;
  const wasm = wasmBytes(), full = entry * cache.seen;
  at("bar").setAttribute("aria-valuemax", cache.slots);
  at("bar").setAttribute("aria-valuenow", cache.live);
  at("fill").style.width = `${(100 * cache.live) / cache.slots}%`;
  at("entries").textContent = `${number(cache.live)} of ${number(cache.slots)} slots of each head are filled`;
  at("seen").textContent = number(cache.seen);
  at("events").textContent = number(session.events);
  at("speed").textContent = rate === null ? "-" : `${rate.toFixed(0)} tokens/s`;
  at("cache").textContent = size(cache.bytes);
  at("full").textContent = size(full);
  at("wasm").textContent = size(wasm);
  if (cache.seen && points.at(-1)?.[0] !== cache.seen) points.push([cache.seen, wasm, wasm + Math.max(0, full - cache.bytes)]);
  if (points.length > POINTS) points = points.filter((_, index) => index % 2 === 1 || index === 0);
  const most = Math.max(1, ...points.map((point) => point[2])) * 1.05, end = points.at(-1)?.[0] ?? 1;
  const line = (which) => points.map((point) => `${((400 * point[0]) / end).toFixed(1)},${(160 - (160 * point[which]) / most).toFixed(1)}`).join(" ");
  at("flat").setAttribute("points", line(1));
  at("grown").setAttribute("points", line(2));
  at("chart-range").textContent = points.length ? `tokens 0 to ${number(end)}; memory 0 to ${size(most)}` : "nothing was read yet";
}

function paragraph(kind) {
  const made = document.createElement("p");
  made.className = kind;
  made.append("");
  at("log").append(made);
  return made.firstChild;
}

function write(node, words) {
  const log = at("log"), low = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  node.appendData(words);
  if (node.length > LONGEST_LOG) node.deleteData(0, node.length - LONGEST_LOG / 2);
  while (log.childElementCount > 1 && log.textContent.length > 2 * LONGEST_LOG) log.firstElementChild.remove();
  if (low) log.scrollTop = log.scrollHeight;
}

async function run(prompt, kind, most) {
  const message = kind === "message";
  const ids = message ? text.message(prompt, started) : text.encode(prompt, started);
  if (message && ids[0] === session.pending) session.pending = null; // the closing token of its answer, said already
  started = false;
  write(paragraph("own"), prompt);
  const answer = paragraph("answer"), push = text.stream();
  await session.feed(ids, async (done) => {
    show(`reading ${number(done)} of ${number(ids.length)}`);
    await pause();
  });
  const from = performance.now(), stops = message ? text.stops : [];
  let made = 0;
  for await (const token of session.generate(most, stops)) {
    made++;
    rate = (1000 * made) / (performance.now() - from);
    if (!stops.includes(token)) write(answer, push(token));
    if (made === 1 || made % 32 === 0) at("state").textContent = "writing";
    draw();
    await pause();
    if (stopping) break;
  }
  return made;
}

at("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const prompt = at("prompt").value;
  if (running || !session || !prompt) return;
  running = true;
  stopping = false;
  show("reading");
  let state, failure;
  try {
    const made = await run(prompt, document.querySelector("input[name=kind]:checked").value, Number(at("most").value));
    state = `ready, ${number(made)} tokens written`;
    at("prompt").value = "";
  } catch (error) {
    [state, failure] = ["stopped by an error", error];
  }
  running = false;
  show(state, failure);
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("form").requestSubmit();
  }
});
at("stop").addEventListener("click", () => { stopping = true; });
at("new").addEventListener("click", () => {
  restart();
  show("ready");
});
at("folder").addEventListener("change", (event) => {
  const files = new Map(Array.from(event.target.files, (file) => [file.name, file]));
  open(async (name) => {
    if (!files.has(name)) throw new Error(`the folder has no ${name}: choose an artefact that trimkv-export made`);
    return new Uint8Array(await files.get(name).arrayBuffer());
  });
});

ort.env.wasm.numThreads = Number(new URLSearchParams(location.search).get("threads") ?? 1);
open(async (name) => {
  const response = await fetch(`artefact/${name}`);
  if (!response.ok) throw new Error(`artefact/${name} is not there: start the server with an artefact's folder, or choose one here`);
  return new Uint8Array(await response.arrayBuffer());
});
