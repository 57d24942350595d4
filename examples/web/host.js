// The cache of a host-evicted artefact: slots, gate scores and the event, as docs/npu.md says. No dependencies.

const PROTECTED = 3.0e38;
const { fround, min, abs, exp, log1p } = Math;

export const logSigmoid = (z) => fround(min(z, 0) - log1p(exp(-abs(z))));

// The lowest leave first. All products are rounded to float32.
export const SCORES = {
  trimkv: (logBeta, position, seen) => fround(logBeta * fround(seen + 1 - position)),
  streaming: (logBeta, position) => fround(position),
};

// Rows of cos and sin for positions; the halves of a row are alike. Angles are float32, as in every engine.
export function rotary({ inverse_frequencies: frequencies, attention_scaling: scaling }, positions, cos, sin) {
  const half = frequencies.length;
  positions.forEach((position, row) => {
    for (let f = 0; f < half; f++) {
      const angle = fround(fround(position) * fround(frequencies[f]));
      for (const at of [2 * half * row + f, 2 * half * row + half + f]) {
        cos[at] = fround(Math.cos(angle)) * fround(scaling);
        sin[at] = fround(Math.sin(angle)) * fround(scaling);
      }
    }
  });
}

export class HostCache {
  // settings: `cache` of manifest.json. key[l] and value[l]: [heads, slots, width]; logBeta, position: [layers, heads, slots].
  constructor(settings, layers, heads, width) {
    if (!(settings.policy in SCORES) || settings.caps) {
      throw new Error(`policy ${settings.policy} is not one of ${Object.keys(SCORES)}: export again with one of them`);
    }
    Object.assign(this, { settings, layers, heads, width, slots: settings.budget + settings.buffer, seen: 0, live: 0 });
    const tables = () => Array.from({ length: layers }, () => new Float32Array(heads * this.slots * width));
    this.key = tables();
    this.value = tables();
    this.logBeta = new Float32Array(layers * heads * this.slots);
    this.position = new Int32Array(layers * heads * this.slots);
    this.scores = new Float32Array(this.slots);
    this.order = new Uint32Array(this.slots);
    this.leaves = new Uint8Array(this.slots);
  }

  get bytes() {
    return [...this.key, ...this.value, this.logBeta, this.position].reduce((sum, table) => sum + table.byteLength, 0);
  }

  // The mask [chunk, slots + chunk] of the next `count` tokens, which are the last rows of the chunk.
  mask(count, chunk, masked, out) {
    const first = chunk - count, columns = this.slots + chunk;
    out.fill(masked);
    for (let row = first; row < chunk; row++) {
      out.fill(0, row * columns, row * columns + this.live);
      out.fill(0, row * columns + this.slots + first, row * columns + this.slots + row + 1);
    }
  }

  // Takes the newest `count` rows of each layer: key(l), value(l) [heads, chunk, width], gate(l) [chunk, heads] or undefined.
  append(count, chunk, key, value, gate) {
    const { heads, slots, width, live } = this, first = chunk - count;
    if (count < 1 || count > slots - live) throw new Error(`${count} tokens given, but ${slots - live} fit`);
    for (let layer = 0; layer < this.layers; layer++) {
      for (let head = 0; head < heads; head++) {
        const from = (head * chunk + first) * width, to = (head * slots + live) * width, row = layer * heads + head;
        this.key[layer].set(key(layer).subarray(from, from + count * width), to);
        this.value[layer].set(value(layer).subarray(from, from + count * width), to);
        for (let t = 0; t < count; t++) {
          const z = gate(layer)?.[(first + t) * heads + head];
          if (Number.isNaN(z)) throw new Error("the graph gave a gate logit that is no number");
          this.logBeta[row * slots + live + t] = z === undefined ? 0 : logSigmoid(z);
          this.position[row * slots + live + t] = this.seen + t;
        }
      }
    }
    this.seen += count;
    this.live += count;
  }

  // The event: every head keeps its best `budget` entries in its first slots. Returns how many rows moved.
  evict() {
    let moved = 0;
    for (let row = 0; row < this.layers * this.heads; row++) moved += this.evictRow(row);
    this.live = this.settings.budget;
    return moved;
  }

  evictRow(row) {
    const { slots, scores, order, leaves, seen } = this, { budget, buffer, sinks, recent, policy } = this.settings;
    const position = this.position.subarray(row * slots, (row + 1) * slots);
    const logBeta = this.logBeta.subarray(row * slots, (row + 1) * slots);
    for (let slot = 0; slot < slots; slot++) {
      const safe = position[slot] < sinks || position[slot] >= seen - recent;
      scores[slot] = safe ? PROTECTED : SCORES[policy](logBeta[slot], position[slot], seen);
      order[slot] = slot;
    }
    // Of equal scores the older entry leaves. (Two of minus infinity differ by NaN, which is false.)
    order.sort((a, b) => scores[a] - scores[b] || position[a] - position[b]);
    leaves.fill(0);
    for (let i = 0; i < buffer; i++) leaves[order[i]] = 1;
    let mover = budget, moved = 0;
    for (let hole = 0; hole < budget; hole++) {
      if (!leaves[hole]) continue;
      while (leaves[mover]) mover++;
      this.copy(row, mover++, hole);
      moved++;
    }
    return moved;
  }

  copy(row, from, to) {
    const { slots, width } = this, layer = Math.floor(row / this.heads), base = (row % this.heads) * slots;
    for (const table of [this.key[layer], this.value[layer]]) {
      table.copyWithin((base + to) * width, (base + from) * width, (base + from + 1) * width);
    }
    for (const table of [this.logBeta, this.position]) table[row * slots + to] = table[row * slots + from];
  }

  // Positions that layer l, head h keeps: row = l * heads + h.
  kept(row) {
    return Array.from(this.position.subarray(row * this.slots, row * this.slots + Math.min(this.live, this.settings.budget)));
  }
}
