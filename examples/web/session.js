// A stream without end over a host-evicted artefact, in fixed memory. `ort` is onnxruntime-web or onnxruntime-node.
import { HostCache, rotary } from "./host.js";

const parse = (bytes) => JSON.parse(new TextDecoder().decode(bytes));

export class Session {
  // load(name): a promise of the bytes of a file of the artefact.
  static async open(ort, load, options = {}) {
    const manifest = parse(await load("manifest.json"));
    const files = manifest.targets["host-evicted"]?.files;
    if (!files) throw new Error("the artefact has no host-evicted target: export it with --target host-evicted");
    const constants = parse(await load(files.constants));
    if (constants.format !== 1) throw new Error(`${files.constants} has format ${constants.format}, not 1`);
    const weights = await load(files.weights), embedding = new Float32Array((await load(files.embedding)).slice().buffer);
    const create = async (name) => ort.InferenceSession.create(await load(name), {
      ...options, externalData: [{ path: files.weights, data: weights }],
    });
    const graphs = { 1: await create(files.decode) };
    if (files.prefill) graphs[manifest.cache.prefill_chunk] = await create(files.prefill);
    return new Session(ort, manifest, constants, embedding, graphs);
  }

  constructor(ort, manifest, constants, embedding, graphs) {
    const { num_layers: layers, num_kv_heads: heads, head_dim: width, hidden_size: hidden, vocab_size: vocabulary } = manifest.model;
    if (embedding.length !== vocabulary * hidden) throw new Error("the embedding does not fit the manifest: copy the whole folder again");
    Object.assign(this, { manifest, constants, embedding, hidden, layers, vocabulary, events: 0, onevent: () => {} });
    this.cache = new HostCache(manifest.cache, layers, heads, width);
    const tensor = (dims, data) => new ort.Tensor("float32", data ?? new Float32Array(dims.reduce((a, b) => a * b)), dims);
    this.graphs = new Map(Object.entries(graphs).map(([key, graph]) => {
      const chunk = Number(key), angles = [1, chunk, 2 * constants.inverse_frequencies.length];
      const feeds = {
        hidden: tensor([1, chunk, hidden]), cos: tensor(angles), sin: tensor(angles),
        mask: tensor([1, 1, chunk, this.cache.slots + chunk]),
      };
      for (let layer = 0; layer < layers; layer++) {
        const slots = [1, heads, this.cache.slots, width];
        feeds[`past.${layer}.key`] = tensor(slots, this.cache.key[layer]);
        feeds[`past.${layer}.value`] = tensor(slots, this.cache.value[layer]);
      }
      return [chunk, { graph, feeds }];
    }));
    this.longest = Math.max(...this.graphs.keys());
    this.reset();
  }

  reset() {
    this.cache.seen = this.cache.live = this.events = 0;
    this.logits = this.pending = null;
  }

  // One run of a graph for 1 to min(longest, free slots) tokens; the event runs when no slot is free.
  async step(ids) {
    const { cache } = this, count = ids.length, limit = this.manifest.rope.position_limit;
    if (cache.seen + count > limit) throw new Error(`the stream may have ${limit} tokens: start a new one`);
    for (const id of ids) if (!(id >= 0 && id < this.vocabulary)) throw new Error(`token ${id} is not in the vocabulary`);
    const chunk = count === 1 ? 1 : this.longest, { graph, feeds } = this.graphs.get(chunk), first = chunk - count;
    const tokens = Array.from({ length: chunk }, (_, row) => Math.max(row - first, 0)); // padding repeats the first token
    tokens.forEach((token, row) => {
      const at = ids[token] * this.hidden;
      feeds.hidden.data.set(this.embedding.subarray(at, at + this.hidden), row * this.hidden);
    });
    rotary(this.constants, tokens.map((token) => cache.seen + token), feeds.cos.data, feeds.sin.data);
    cache.mask(count, chunk, this.constants.masked, feeds.mask.data);
    const out = await graph.run(feeds);
    cache.append(count, chunk, (l) => out[`new.${l}.key`].data, (l) => out[`new.${l}.value`].data, (l) => out[`gate.${l}`]?.data);
    this.logits = out.logits.data;
    if (cache.live === cache.slots) {
      cache.evict();
      this.events++;
      this.onevent(this);
    }
  }

  // Reads tokens, after the newest generated one; progress(tokens read) may return a promise.
  async feed(ids, progress = () => {}) {
    const all = this.pending === null ? ids : [this.pending, ...ids];
    this.pending = null;
    for (let at = 0; at < all.length;) {
      const count = Math.min(this.longest, this.cache.slots - this.cache.live, all.length - at);
      await this.step(all.slice(at, at + count));
      at += count;
      await progress(at);
    }
  }

  // Yields the most likely next token, up to `count` times or to the first of `stops`, which it yields too.
  async *generate(count, stops = []) {
    if (!this.logits) throw new Error("nothing was read yet: feed a prompt first");
    for (let made = 0; made < count; made++) {
      if (this.pending !== null) await this.step([this.pending]);
      this.pending = this.logits.reduce((best, logit, id) => (logit > this.logits[best] ? id : best), 0);
      yield this.pending;
      if (stops.includes(this.pending)) return;
    }
  }
}
