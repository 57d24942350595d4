// Reads a stream as engines_agree.py does: chunks until the cache is full, then single tokens.
//   node engines_agree.js ARTEFACT STREAM.json          prints what was kept at each event and the greedy tokens

// session: of examples/web/session.js, nothing read yet.
export async function read(session, tokens) {
  const { cache, longest } = session, kept = [], greedy = [];
  session.onevent = () => kept.push(Array.from({ length: cache.layers * cache.heads }, (_, row) => cache.kept(row)));
  for (let at = 0; at < tokens.length;) {
    const full = cache.slots - at, count = full > 0 ? Math.min(longest, full) : 1;
    await session.step(tokens.slice(at, at + count));
    greedy.push(session.logits.reduce((best, logit, id) => (logit > session.logits[best] ? id : best), 0));
    at += count;
  }
  return { kept, greedy };
}

if (globalThis.process && process.argv[1] === import.meta.filename) {
  const { readFile } = await import("node:fs/promises");
  const { join } = await import("node:path");
  const web = join(import.meta.dirname, "..", "examples", "web");
  const [folder, stream] = process.argv.slice(2);
  const { Session } = await import(join(web, "session.js"));
  const ort = await import(join(web, "node_modules", "onnxruntime-web", "dist", "ort.wasm.min.mjs"));
  ort.env.wasm.numThreads = 1;
  const session = await Session.open(ort, (name) => readFile(join(folder, name)));
  console.log(JSON.stringify(await read(session, JSON.parse(await readFile(stream, "utf8")))));
}
