"use strict";

const KINDS = ["text", "image", "video"];
const KIND_NAMES = {text: "text", image: "images", video: "videos"};

// What the cache holds of each kind over the stream.
class KindChart {
  constructor(host, readout, run, onTime) {
    Object.assign(this, {host, readout, run, onTime});
    this.kindOf = new Uint8Array(run.tokens);
    for (const {kind, start, down, across} of run.data.pictures) this.kindOf.fill(KINDS.indexOf(kind), start, start + down * across);
    this.kinds = KINDS.filter((kind, index) => !index || run.data.pictures.some((picture) => picture.kind === kind));
  }

  // [kind][stream length]: entries held.
  count(chosen) {
    const {run, kindOf} = this, {tokens, rows, left} = run;
    const held = KINDS.map(() => new Int32Array(tokens + 2));
    for (let p = 0; p < tokens; p++) {
      const of = held[kindOf[p]];
      of[p + 1] += chosen.length;
      for (const row of chosen) of[Math.min(left[p * rows + row], tokens + 1)]--;
    }
    for (const of of held) for (let seen = 1; seen <= tokens; seen++) of[seen] += of[seen - 1];
    return held;
  }

  draw(chosen) {
    const {run} = this;
    this.held = this.count(chosen);
    this.chart = streamChart(this.host, run, this.onTime, {
      x: {label: "tokens read"},
      y: {min: 0, max: 1, format: percent, label: "share of the entries"},
      height: 176,
      label: "Shares of text, images and videos in the cache over the stream",
    });
    const step = Math.ceil(run.tokens / 600), seens = [];
    for (let seen = run.tokens; seen > 0; seen -= step) seens.unshift(seen);
    const key = element("div", "raster-key lines-key");
    this.kinds.forEach((kind, index) => {
      const style = {stroke: colour("lines", index / 2), "stroke-width": 2, class: ["", "kind-dashed", "kind-dotted"][KINDS.indexOf(kind)]};
      this.chart.line(seens, seens.map((seen) => this.share(kind, seen)), style);
      const item = element("span", "line-item"), sample = node("svg", {width: 26, height: 6, "aria-hidden": "true"});
      sample.append(node("line", {...style, x1: 1, x2: 25, y1: 3, y2: 3}));
      item.append(sample, KIND_NAMES[kind]);
      key.append(item);
    });
    this.host.append(key);
  }

  share(kind, seen) {
    const all = this.held.reduce((sum, of) => sum + of[seen], 0);
    return this.held[KINDS.indexOf(kind)][seen] / (all || 1);
  }

  at(seen) {
    this.chart.at(seen);
    const parts = this.kinds.map((kind) => `${KIND_NAMES[kind]} ${percent(this.share(kind, seen))} (${grouped.format(this.held[KINDS.indexOf(kind)][seen])} entries)`);
    this.readout.textContent = `After ${grouped.format(seen)} tokens: ${parts.join(", ")}.`;
  }
}
