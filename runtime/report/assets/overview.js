"use strict";

// The stream against itself: time to the right, position downwards, colour for the share of the heads that hold it.
class Overview {
  constructor(host, run, onTime) {
    this.host = host;
    this.run = run;
    this.canvas = element("canvas");
    this.cursor = element("div", "raster-cursor");
    const frame = element("div", "raster-frame");
    frame.append(this.canvas, this.cursor);
    this.key = element("div", "raster-key");
    host.replaceChildren(frame, this.key);
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", "Map of the stream: which parts of the text are held at which moment");
    const move = (event) => {
      const box = frame.getBoundingClientRect();
      onTime(Math.round(((event.clientX - box.left) / box.width) * run.tokens));
    };
    frame.addEventListener("pointerdown", (event) => {
      frame.setPointerCapture(event.pointerId);
      move(event);
    });
    frame.addEventListener("pointermove", (event) => event.buttons && move(event));
  }

  draw(chosen) {
    const {size, table} = this.run.raster(chosen, 600);
    this.canvas.width = this.canvas.height = size;
    const context = this.canvas.getContext("2d");
    const image = context.createImageData(size, size);
    const palette = Array.from({length: 256}, (_, level) => mix(scale("map"), Math.sqrt(level / 255)));
    for (let at = 0; at < table.length; at++) {
      if (Number.isNaN(table[at])) continue;
      const [red, green, blue] = palette[Math.round(table[at] * 255)];
      image.data.set([red, green, blue, 255], at * 4);
    }
    context.putImageData(image, 0, 0);
    this.key.replaceChildren(
      element("span", "", "position in the text ↓"),
      element("span", "", "tokens read →"),
      mapKey("0 %", "100 % of the heads"),
    );
  }

  at(seen) {
    this.cursor.style.left = `${(seen / this.run.tokens) * 100}%`;
  }
}

// Layers to the right, KV heads downwards.
class HeatMap {
  constructor(host, run, onCell) {
    this.host = host;
    this.run = run;
    this.onCell = onCell;
  }

  layout() {
    const {layers, heads} = this.run, left = 46, bottom = 34;
    const width = Math.max(this.host.clientWidth, 160);
    const across = (width - left - 6) / layers;
    const down = Math.max(heads > 40 ? 5 : 12, Math.min(40, across, 420 / heads));
    const height = Math.ceil(down * heads) + bottom + 4;
    const svg = node("svg", {width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Heat map of layers and heads"});
    this.cells = [];
    for (let row = 0; row < this.run.rows; row++) {
      const layer = Math.floor(row / heads), head = row % heads;
      const gap = across > 6 && down > 6 ? 1 : 0;
      const box = {x: left + layer * across, y: 2 + head * down, width: across - gap, height: down - gap};
      const cell = svg.appendChild(node("rect", {...box, rx: gap && 2, class: "cell"}));
      const title = cell.appendChild(node("title"));
      cell.addEventListener("click", () => this.onCell(layer, head));
      const roomy = across >= 34 && down >= 15;
      const text = roomy && svg.appendChild(node("text", {x: box.x + box.width / 2, y: box.y + box.height / 2 + 4, class: "cell-text"}));
      this.cells.push({cell, title, text, layer, head});
    }
    const every = Math.ceil(layers / Math.max(1, Math.floor((width - left) / 28)));
    for (let layer = 0; layer < layers; layer += every) {
      svg.append(node("text", {class: "tick-x", x: left + (layer + 0.5) * across, y: height - bottom + 15}, layer));
    }
    const step = Math.ceil(14 / down);
    for (let head = 0; head < heads; head += step) {
      svg.append(node("text", {class: "tick-y", x: left - 6, y: 2 + (head + 0.5) * down + 4}, this.run.data.heads[head]));
    }
    svg.append(node("text", {class: "axis", x: (left + width) / 2, y: height - 3}, "layer"));
    svg.append(node("text", {class: "axis", x: -(2 + (heads * down) / 2), y: 12, transform: "rotate(-90)"}, heads > 1 ? "KV head" : "head"));
    this.key = element("div", "raster-key");
    this.host.replaceChildren(svg, this.key);
  }

  draw(census, measure, chosen) {
    const values = census[measure];
    const most = measure === "oldest" ? 1 : Math.max(1, ...values);
    const show = measure === "oldest" ? percent : (value) => (value < 1e4 ? grouped : short).format(Math.round(value));
    const on = new Set(chosen.length < this.run.rows ? chosen : []);
    this.cells.forEach(({cell, title, text, layer, head}, row) => {
      const level = values[row] / most;
      cell.style.fill = mapColour(level);
      cell.classList.toggle("on", on.has(row));
      title.textContent = `layer ${layer}, head ${this.run.data.heads[head]}: ${grouped.format(census.entries[row])} entries, mean age ${grouped.format(census.age[row])} tokens, ${percent(census.oldest[row])} from the oldest tenth`;
      if (text) {
        text.textContent = show(values[row]);
        text.style.fill = inkOn("map", Math.sqrt(level));
      }
    });
    const unit = {entries: " entries", age: " tokens", oldest: " of its entries"}[measure];
    this.key.replaceChildren(element("span", "", "Click a head to choose it, again for all."), mapKey(show(0), show(most) + unit));
  }
}
