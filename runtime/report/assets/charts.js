"use strict";

// A chart over the stream: a click or drag moves the stream to that place.
function streamChart(host, run, onTime, options) {
  const chart = new Chart(host, {...options, x: {min: 0, max: run.tokens, ...options.x}});
  const move = (event) => onTime(Math.round(chart.valueAt(event)));
  chart.svg.addEventListener("pointerdown", (event) => {
    chart.svg.setPointerCapture(event.pointerId);
    move(event);
  });
  chart.svg.addEventListener("pointermove", (event) => event.buttons && move(event));
  return chart;
}

function last(values, seen) {
  let low = 0, high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] <= seen) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

class SurvivalChart {
  constructor(host, readout, run) {
    Object.assign(this, {host, readout, run});
    const end = Math.max(1, run.tokens - Math.floor(run.tokens / 20));
    this.ages = [...new Set(Array.from({length: 160}, (_, index) => Math.round(end ** (index / 159))))];
    this.layers = Array.from({length: run.layers}, (_, layer) => this.sampled(run.chosen(layer, -1)));
  }

  sampled(chosen) {
    const shares = this.run.survival(chosen);
    return this.ages.map((age) => shares[age]);
  }

  draw(layer, head) {
    const {run, ages} = this, end = Math.max(2, ages.at(-1));
    const lowest = Math.min(1, ...this.layers.flat().filter((share) => share > 0));
    const floor = Math.max(1e-4, 10 ** Math.floor(Math.log10(lowest * 0.999)));
    this.chart = new Chart(this.host, {
      x: {min: 1, max: end, log: true, label: "age in tokens"},
      y: {min: Math.min(floor, 0.1), max: 1, log: true, format: percent},
      height: 250,
      left: 54,
      label: "Share of tokens still held by age, per layer",
    });
    const tone = (index) => colour("lines", run.layers > 1 ? index / (run.layers - 1) : 0);
    this.layers.forEach((shares, index) => {
      const faded = head >= 0 || (layer >= 0 && layer !== index);
      this.trace(shares, {stroke: tone(index), "stroke-width": layer === index ? 3 : 1.7, class: faded ? "faded" : ""});
    });
    this.picked = null;
    if (head >= 0) {
      this.picked = this.sampled(run.chosen(layer, head));
      this.trace(this.picked, {class: "picked"});
    }
    this.chart.svg.addEventListener("pointermove", (event) => this.show(this.chart.valueAt(event), layer));
    this.key(tone);
    this.show(Math.min(run.data.slots, end), layer);
  }

  trace(shares, attributes) {
    const end = shares.findIndex((share) => share <= 0);
    const count = end < 0 ? shares.length : end;
    this.chart.line(this.ages.slice(0, count), shares.slice(0, count), {"stroke-linejoin": "round", ...attributes});
  }

  key(tone) {
    const key = element("div", "raster-key lines-key");
    const count = this.run.layers;
    for (let layer = 0; layer < count; layer += Math.ceil(count / 12)) {
      const item = element("span", "line-item");
      const bar = element("i");
      bar.style.background = tone(layer);
      item.append(bar, count > 1 ? `layer ${layer}` : "the layer");
      key.append(item);
    }
    if (this.picked) key.append(element("span", "line-item picked-item", "chosen head"));
    this.host.append(key);
  }

  show(age, layer) {
    const index = Math.max(0, last(this.ages, age));
    this.chart.at(this.ages[index]);
    const of = (shares) => percent(shares[index]);
    const shares = this.layers.map((values) => values[index]);
    let text = `Age ${grouped.format(this.ages[index])}: `;
    if (this.picked) text += `${of(this.picked)} in the chosen head`;
    else if (layer >= 0) text += `${of(this.layers[layer])} in layer ${layer}`;
    else if (shares.length <= 6) text += shares.map((share, at) => `${percent(share)} in layer ${at}`).join(", ");
    else text += `${percent(Math.min(...shares))} to ${percent(Math.max(...shares))} by layer`;
    this.readout.textContent = text;
  }
}

class DepartureCharts {
  constructor(hosts, readout, run, onTime) {
    Object.assign(this, {hosts, readout, run, onTime});
  }

  draw(chosen) {
    const {run, hosts} = this, {events} = run;
    this.found = run.departures(chosen);
    const shown = events.map((_, event) => event).filter((event) => this.found.count[event]);
    const best = (values, how) => thin(shown, 500, (all, from, to) => how(...all.slice(from, to).map((event) => values[event])));
    const xs = best(events, Math.max), low = best(this.found.low, Math.min), high = best(this.found.high, Math.max);
    const median = thin(shown, 500, (all, from, to) => this.found.median[all[(from + to) >> 1]]);
    this.charts = [
      streamChart(hosts[0], run, this.onTime, {
        y: {min: 1, max: Math.max(10, ...high), log: true, label: "age in tokens"},
        height: 166,
        label: "Age of the entries that left at each event",
      }),
      streamChart(hosts[1], run, this.onTime, {
        x: {label: "tokens read"},
        y: {min: 0, max: Math.max(1, ...best(this.found.count, Math.max)) * 1.15, label: "entries that left"},
        height: 126,
        label: "Entries that left at each event",
      }),
    ];
    this.charts[0].band(xs, low, high, {class: "band"});
    this.charts[0].line(xs, median, {class: "trace"});
    const counts = best(this.found.count, Math.max), base = this.charts[1].py(0);
    const width = Math.min(6, (0.8 * (this.charts[1].px(run.tokens) - this.charts[1].px(0))) / Math.max(1, xs.length));
    const bars = xs.map((x, index) => {
      const [left, top] = [this.charts[1].px(x), this.charts[1].py(counts[index])];
      return `M${left.toFixed(1)} ${base}V${top.toFixed(1)}h${(-width).toFixed(2)}V${base}Z`;
    });
    this.charts[1].plot.append(node("path", {class: "bars", d: bars.join("")}));
  }

  at(seen) {
    for (const chart of this.charts) chart.at(seen);
    const event = last(this.run.events, seen), {count, low, median, high} = this.found;
    const when = `Event ${event + 1} of ${this.run.events.length}, at ${grouped.format(this.run.events[event] ?? 0)} tokens: `;
    if (event < 0) this.readout.textContent = `No event yet: ${this.run.events.length} in all.`;
    else if (!count[event]) this.readout.textContent = `${when}nothing left the chosen heads.`;
    else {
      this.readout.textContent = `${when}${grouped.format(count[event])} entries left, median age ${grouped.format(median[event])} (${grouped.format(low[event])} to ${grouped.format(high[event])}).`;
    }
  }
}

class MachineCharts {
  constructor(hosts, readout, run, onTime) {
    Object.assign(this, {hosts, readout, run, onTime});
    const {seen, seconds, rss, entries} = run.data.chunks;
    this.heads = run.layers * run.data.kvHeads;
    const ends = (values, from, to) => values[to - 1];
    this.seen = thin(seen, 300, ends);
    this.entries = thin(entries, 300, ends).map((count) => count / this.heads);
    this.memory = thin(rss, 300, ends).map((bytes) => bytes / 2 ** 20);
    const spent = thin(seconds, 300, (all, from, to) => all.slice(from, to).reduce((sum, part) => sum + part, 0));
    this.speed = this.seen.map((end, index) => (end - (this.seen[index - 1] || 0)) / Math.max(spent[index], 1e-6));
  }

  draw() {
    const {run, hosts} = this;
    const make = (host, values, label, more, described) => {
      const chart = streamChart(host, run, this.onTime, {
        y: {min: 0, max: Math.max(...values) * 1.25 || 1, label},
        height: more.x ? 138 : 118,
        label: described,
        ...more,
      });
      chart.line(this.seen, values, {class: "trace"});
      return chart;
    };
    this.charts = [
      make(hosts[0], this.entries, "entries per head", {}, "Entries held per head over the stream"),
      make(hosts[1], this.memory, "memory, MiB", {}, "Resident memory of the process over the stream"),
      make(hosts[2], this.speed, "tokens per second", {x: {label: "tokens read"}}, "Speed over the stream"),
    ];
  }

  at(seen) {
    for (const chart of this.charts) chart.at(seen);
    const index = Math.max(0, Math.min(this.seen.length - 1, last(this.seen, seen - 1) + 1));
    this.readout.textContent = `${grouped.format(this.entries[index])} entries per head (a cache that keeps everything: ${grouped.format(this.seen[index])}), ${grouped.format(this.memory[index])} MiB, ${short.format(this.speed[index])} tokens per second.`;
  }
}
