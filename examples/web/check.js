// Reads a stream of tokens, goes on greedily, and prints as JSON what each event kept and what was said.
//   node check.js ARTEFACT STREAM.json node|web     STREAM.json: {"tokens": [...], "new": 100}
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { wasmBytes } from "./memory.js";
import { Session } from "./session.js";
import { Text } from "./text.js";

const [folder, stream, runtime] = process.argv.slice(2);
const ort = await import(runtime === "web" ? "onnxruntime-web/wasm" : "onnxruntime-node");
if (runtime === "web") ort.env.wasm.numThreads = 1;
const load = (name) => readFile(join(folder, name));
const session = await Session.open(ort.default ?? ort, load);
const text = await Text.open(load, session.manifest);
const { tokens, new: count } = JSON.parse(await readFile(stream, "utf8"));
const events = [], said = [], wasm = [], push = text.stream();
session.onevent = ({ cache }) => {
  events.push({ seen: cache.seen, kept: Array.from({ length: cache.layers * cache.heads }, (_, row) => cache.kept(row)) });
  wasm.push(wasmBytes());
};
const started = performance.now();
await session.feed(tokens);
const read = performance.now();
let words = "";
for await (const token of session.generate(count)) {
  said.push(token);
  words += push(token);
}
const ms = { read: read - started, each: (performance.now() - read) / count };
console.log(JSON.stringify({ events, said, text: words, wasm, ms, seen: session.cache.seen }));
