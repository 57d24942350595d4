"use strict";

const NEVER = 2147483647;

async function inflate(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// The recorded stream. A row is one KV head of one layer; `left` holds, token after token, the stream length at which
// each row dropped the token.
class Recorded {
  constructor(data, planes) {
    this.data = data;
    this.tokens = data.tokens;
    this.layers = data.layers;
    this.heads = data.heads.length;
    this.rows = this.layers * this.heads;
    this.events = data.events;
    this.left = this.unpack(planes);
  }

  unpack(planes) {
    const {tokens, rows, events} = this;
    const left = new Int32Array(tokens * rows);
    const size = tokens * rows;
    for (let plane = 0; plane * size < planes.length; plane++) {
      for (let row = 0, from = plane * size; row < rows; row++) {
        for (let p = 0; p < tokens; p++) left[p * rows + row] |= planes[from++] << (8 * plane);
      }
    }
    let first = 0;
    for (let p = 0; p < tokens; p++) {
      while (first < events.length && events[first] <= p) first++;
      for (let at = p * rows; at < (p + 1) * rows; at++) {
        const event = first + left[at];
        left[at] = event < events.length ? events[event] : NEVER;
      }
    }
    return left;
  }

  // Rows of a layer and a head; -1: all.
  chosen(layer, head) {
    const out = [];
    for (let row = 0; row < this.rows; row++) {
      const fits = (layer < 0 || Math.floor(row / this.heads) === layer) && (head < 0 || row % this.heads === head);
      if (fits) out.push(row);
    }
    return Int32Array.from(out);
  }

  // Per token at stream length `seen`: how many of the rows hold it.
  holders(seen, chosen) {
    const out = new Uint16Array(this.tokens);
    for (let p = 0; p < seen; p++) {
      let count = 0;
      for (const row of chosen) if (this.left[p * this.rows + row] > seen) count++;
      out[p] = count;
    }
    return out;
  }

  // Per token: mean number of tokens for which the rows held it, up to `seen`.
  stays(seen, chosen) {
    const out = new Float32Array(this.tokens);
    for (let p = 0; p < seen; p++) {
      let sum = 0;
      for (const row of chosen) sum += Math.min(this.left[p * this.rows + row], seen) - p;
      out[p] = sum / chosen.length;
    }
    return out;
  }

  // Per row at stream length `seen`: entries, their mean age, and the share from the first tenth of the stream.
  census(seen) {
    const {left, rows} = this;
    const entries = new Int32Array(rows), age = new Float64Array(rows), oldest = new Float64Array(rows);
    const tenth = Math.ceil(seen / 10);
    for (let p = 0, at = 0; p < seen; p++) {
      const old = p < tenth ? 1 : 0;
      for (let row = 0; row < rows; row++, at++) {
        if (left[at] > seen) {
          entries[row]++;
          age[row] += seen - p;
          oldest[row] += old;
        }
      }
    }
    for (let row = 0; row < rows; row++) {
      age[row] /= entries[row] || 1;
      oldest[row] /= entries[row] || 1;
    }
    return {entries, age, oldest};
  }

  // Of the tokens that reached an age, the share still held at it: index 0 is unused, the last is `tokens`.
  survival(chosen) {
    const {left, rows, tokens} = this;
    const held = new Float64Array(tokens + 2);
    for (let p = 0; p < tokens; p++) {
      for (const row of chosen) held[Math.min(left[p * rows + row] - p - 1, tokens - p)]++;
    }
    for (let age = tokens; age >= 0; age--) held[age] += held[age + 1];
    return held.subarray(0, tokens + 1).map((count, age) => age && count / ((tokens - age + 1) * chosen.length));
  }

  // Per event: how many entries left, and the percentiles of their ages.
  departures(chosen) {
    const {left, rows, tokens, events} = this;
    const index = new Map(events.map((seen, event) => [seen, event]));
    const start = new Int32Array(events.length + 1);
    for (let p = 0; p < tokens; p++) {
      for (const row of chosen) {
        const seen = left[p * rows + row];
        if (seen !== NEVER) start[index.get(seen) + 1]++;
      }
    }
    const count = start.slice(1);
    for (let event = 0; event < events.length; event++) start[event + 1] += start[event];
    const ages = new Int32Array(start[events.length]), next = start.slice(0, -1);
    // Newest first, so that the ages of each event rise.
    for (let p = tokens - 1; p >= 0; p--) {
      for (const row of chosen) {
        const seen = left[p * rows + row];
        if (seen !== NEVER) ages[next[index.get(seen)]++] = seen - p;
      }
    }
    const quantile = (tenths) =>
      count.map((total, event) => (total ? ages[start[event] + Math.floor(((total - 1) * tenths) / 10)] : 0));
    return {count, low: quantile(1), median: quantile(5), high: quantile(9)};
  }

  // [position][time] in stretches of the stream: share of the rows that hold it; NaN before the stretch is read.
  raster(chosen, most) {
    const {left, rows, tokens} = this;
    const size = Math.min(most, tokens), table = new Float32Array(size * size).fill(NaN);
    const edge = (index) => Math.floor((index * tokens) / size);
    for (let y = 0; y < size; y++) {
      const gone = new Int32Array(size + 1);
      for (let p = edge(y); p < edge(y + 1); p++) {
        for (const row of chosen) {
          const seen = left[p * rows + row];
          // The first column whose moment, edge(x + 1), is not before.
          if (seen <= tokens) gone[Math.max(Math.ceil((seen * size) / tokens) - 1, y)]++;
        }
      }
      const all = (edge(y + 1) - edge(y)) * chosen.length;
      for (let x = y, sum = 0; x < size; x++) table[y * size + x] = 1 - (sum += gone[x]) / all;
    }
    return {size, table};
  }
}
