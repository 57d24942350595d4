// Checks host.js against the test vectors of docs/npu.md:   node vectors.js ../../docs/npu/vectors.json
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { HostCache, SCORES, logSigmoid, rotary } from "./host.js";

const vectors = JSON.parse(await readFile(process.argv[2], "utf8")), skipped = [];
vectors.log_sigmoid.logit.forEach((logit, i) => assert.equal(logSigmoid(logit), vectors.log_sigmoid.log_beta[i]));
for (const { log_beta, position, seen, score } of vectors.scores) {
  assert.equal(SCORES.trimkv(Math.fround(log_beta), position, seen), score);
}
for (const { positions, cos, sin, ...constants } of vectors.rotary) {
  const width = 2 * constants.inverse_frequencies.length, made = [0, 1].map(() => new Float32Array(positions.length * width));
  rotary(constants, positions, ...made);
  [cos, sin].forEach((rows, which) => rows.flat().forEach((wanted, i) => {
    assert.ok(Math.abs(made[which][i] - wanted) <= 1.2e-7 * Math.abs(wanted) + 1e-9, `rotary ${made[which][i]} ${wanted}`);
  }));
}
for (const { slots, live, count, chunk, visible } of vectors.masks) {
  const cache = new HostCache({ policy: "trimkv", budget: slots, buffer: 0 }, 1, 1, 1), out = new Float32Array(chunk * (slots + chunk));
  cache.live = live;
  cache.mask(count, chunk, -1e4, out);
  const columns = slots + chunk, seen = Array.from({ length: chunk }, (_, row) => Array.from(out.subarray(row * columns, (row + 1) * columns)));
  assert.deepEqual(seen.map((row) => row.flatMap((value, column) => (value === 0 ? [column] : []))), visible);
}
for (const { name, policy, layers, kv_heads: heads, chunks, gate_logits: logits, events, end, ...settings } of vectors.streams) {
  if (!(policy in SCORES)) {
    skipped.push(name);
    continue;
  }
  const cache = new HostCache({ policy, ...settings }, layers, heads, 1), left = [...events];
  const positions = () => {
    const rows = Array.from({ length: layers * heads }, (_, row) => Array.from(cache.position.subarray(row * cache.slots, row * cache.slots + cache.live)));
    // Keys are positions here, so that rows which go astray are seen.
    rows.forEach((row, at) => row.forEach((position, slot) => {
      for (const table of [cache.key, cache.value]) assert.equal(table[Math.floor(at / heads)][(at % heads) * cache.slots + slot], position);
    }));
    return Array.from({ length: layers }, (_, layer) => rows.slice(layer * heads, (layer + 1) * heads));
  };
  for (const count of chunks) {
    const chunk = count + 1, now = cache.seen; // one row of padding
    const rows = () => Float32Array.from({ length: heads * chunk }, (_, at) => (at % chunk ? now + (at % chunk) - 1 : -1));
    const gate = (layer) => Float32Array.from([...Array(heads).fill(-1), ...logits.slice(now, now + count).flatMap((token) => token[layer])]);
    cache.append(count, chunk, rows, rows, gate);
    if (cache.live < cache.slots) continue;
    const moved = cache.evict();
    assert.deepEqual({ seen: cache.seen, moved, positions: positions() }, left.shift());
  }
  assert.deepEqual({ left, positions: positions() }, { left: [], positions: end.positions ?? end });
}
console.log(JSON.stringify({ streams: vectors.streams.length - skipped.length, skipped }));
