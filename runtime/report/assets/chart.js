"use strict";

const SVG = "http://www.w3.org/2000/svg";

function node(name, attributes = {}, text) {
  const out = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) out.setAttribute(key, value);
  if (text !== undefined) out.textContent = text;
  return out;
}

function element(name, className, text) {
  const out = document.createElement(name);
  if (className) out.className = className;
  if (text !== undefined) out.textContent = text;
  return out;
}

const grouped = new Intl.NumberFormat("en", {maximumFractionDigits: 1});
const short = new Intl.NumberFormat("en", {notation: "compact", maximumFractionDigits: 1});

function percent(share) {
  const value = share * 100;
  return `${value >= 10 ? Math.round(value) : Number(value.toPrecision(value >= 1 ? 2 : 1))} %`;
}

// Round numbers of an axis.
function ticks(axis, most) {
  if (axis.log) {
    const out = [];
    for (let power = Math.ceil(Math.log10(axis.min) - 1e-9); 10 ** power <= axis.max * (1 + 1e-9); power++) out.push(10 ** power);
    const step = Math.ceil(out.length / most);
    return out.filter((_, index) => index % step === 0);
  }
  const rough = (axis.max - axis.min) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const out = [];
  for (let value = Math.ceil(axis.min / step) * step; value <= axis.max * (1 + 1e-9); value += step) out.push(value);
  return out;
}

// An SVG plot with axes in a host element; `x` and `y` are {min, max, log, label, format}.
class Chart {
  constructor(host, {x, y, height, label, left = 46}) {
    this.host = host;
    Object.assign(this, {x, y, height, left, right: 10, top: y.label ? 24 : 8, bottom: x.label ? 34 : 20});
    this.width = Math.max(host.clientWidth, 160);
    this.svg = node("svg", {width: this.width, height, viewBox: `0 0 ${this.width} ${height}`, role: "img", "aria-label": label});
    this.axes();
    this.plot = this.svg.appendChild(node("g"));
    this.cursor = this.svg.appendChild(node("line", {class: "cursor", y1: this.top, y2: height - this.bottom, visibility: "hidden"}));
    host.replaceChildren(this.svg);
  }

  static place(axis, value, from, to) {
    const scaled = axis.log ? Math.log(Math.max(value, axis.min) / axis.min) / Math.log(axis.max / axis.min) : (value - axis.min) / (axis.max - axis.min);
    return from + (to - from) * Math.max(0, Math.min(1, scaled));
  }

  px(value) {
    return Chart.place(this.x, value, this.left, this.width - this.right);
  }

  py(value) {
    return Chart.place(this.y, value, this.height - this.bottom, this.top);
  }

  // The value of the x axis under a pointer.
  valueAt(event) {
    const box = this.svg.getBoundingClientRect();
    const share = Math.max(0, Math.min(1, (event.clientX - box.left - this.left) / (this.width - this.left - this.right)));
    return this.x.log ? this.x.min * (this.x.max / this.x.min) ** share : this.x.min + (this.x.max - this.x.min) * share;
  }

  axes() {
    const {svg, left, width, right, top, height, bottom} = this;
    for (const value of ticks(this.y, height > 120 ? 5 : 3)) {
      const y = this.py(value);
      svg.append(node("line", {class: "grid", x1: left, x2: width - right, y1: y, y2: y}));
      svg.append(node("text", {class: "tick-y", x: left - 6, y: y + 4}, (this.y.format || short.format)(value)));
    }
    for (const value of ticks(this.x, width > 420 ? 6 : 4)) {
      const x = this.px(value);
      svg.append(node("line", {class: "grid", x1: x, x2: x, y1: top, y2: height - bottom}));
      svg.append(node("text", {class: "tick-x", x, y: height - bottom + 15}, (this.x.format || short.format)(value)));
    }
    if (this.x.label) svg.append(node("text", {class: "axis", x: (left + width - right) / 2, y: height - 3}, this.x.label));
    if (this.y.label) svg.append(node("text", {class: "axis-y", x: left, y: top - 9}, this.y.label));
  }

  line(xs, ys, attributes) {
    let path = "";
    for (let index = 0; index < xs.length; index++) {
      path += `${path ? "L" : "M"}${this.px(xs[index]).toFixed(1)} ${this.py(ys[index]).toFixed(1)}`;
    }
    return this.plot.appendChild(node("path", {fill: "none", ...attributes, d: path}));
  }

  band(xs, low, high, attributes) {
    const points = [...xs].map((x, index) => `${this.px(x).toFixed(1)} ${this.py(high[index]).toFixed(1)}`);
    const back = [...xs].map((x, index) => `${this.px(x).toFixed(1)} ${this.py(low[index]).toFixed(1)}`).reverse();
    if (points.length) this.plot.appendChild(node("path", {...attributes, d: `M${points.join("L")}L${back.join("L")}Z`}));
  }

  at(value) {
    const x = this.px(value);
    this.cursor.setAttribute("x1", x);
    this.cursor.setAttribute("x2", x);
    this.cursor.setAttribute("visibility", "visible");
  }
}

// Joins neighbours until at most `most` are left; `how` makes one value of a slice.
function thin(values, most, how) {
  const size = Math.max(1, Math.ceil(values.length / most)), out = [];
  for (let from = 0; from < values.length; from += size) out.push(how(values, from, Math.min(from + size, values.length)));
  return out;
}
