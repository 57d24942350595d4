"use strict";

const LEVELS = 24;
const UNREAD = -2, GONE = -1;

// The text in blocks that get an element for each token only near the visible part.
class TextView {
  constructor(host, run, onToken) {
    Object.assign(this, {host, run, onToken});
    this.special = new Set(run.data.special);
    this.levels = new Int8Array(run.tokens).fill(UNREAD);
    this.pinned = 0;
    this.blocks = [];
    this.blockOf = new Int32Array(run.tokens);
    const watch = new IntersectionObserver((found) => found.forEach((entry) => this.toggle(entry)), {root: host, rootMargin: "500px"});
    for (const [from, to] of this.ranges()) {
      const block = element("div", "block", this.shown(from, to).join(""));
      block.index = this.blocks.length;
      this.blockOf.fill(block.index, from, to);
      this.blocks.push({block, from, to, spans: null});
      watch.observe(host.appendChild(block));
    }
    this.listen();
  }

  // Blocks end at line ends, where a break is not seen, unless lines are very long.
  ranges() {
    const {text} = this.run.data, out = [];
    let from = 0;
    for (let p = 0; p < text.length; p++) {
      const size = p + 1 - from;
      if ((size >= 150 && text[p].endsWith("\n")) || size >= 2000 || p === text.length - 1) {
        out.push([from, p + 1]);
        from = p + 1;
      }
    }
    return out;
  }

  shown(from, to) {
    return this.run.data.text.slice(from, to).map((text) => (text === "" ? "·" : text.replaceAll("\n", "↵\n")));
  }

  toggle({target, isIntersecting}) {
    const entry = this.blocks[target.index];
    if (isIntersecting) this.fill(entry);
    else if (entry.spans && this.blockOf[this.pinned] !== target.index) {
      entry.spans = null;
      entry.block.textContent = this.shown(entry.from, entry.to).join("");
    }
  }

  fill(entry) {
    if (entry.spans) return;
    entry.spans = this.shown(entry.from, entry.to).map((text, index) => {
      const span = element("span", "", text), position = entry.from + index;
      span.position = position;
      span.kind = "tok";
      if (this.special.has(position)) span.kind += " special";
      if (this.run.data.text[position] === "") span.kind += " part";
      if (position >= this.run.data.promptTokens) span.kind += " made";
      this.paint(span, this.levels[position]);
      return span;
    });
    entry.block.replaceChildren(...entry.spans);
  }

  paint(span, level) {
    span.className = span.kind + (level === UNREAD ? " unread" : level === GONE ? " gone" : "");
    span.style.background = level < 0 ? "" : colour("text", level / LEVELS);
    if (span.position === this.pinned) span.classList.add("current");
  }

  // `levels`: per token UNREAD, GONE or 0 to LEVELS.
  shade(levels, force) {
    for (const {spans, from} of this.blocks) {
      if (!spans) continue;
      spans.forEach((span, index) => {
        const level = levels[from + index];
        if (force || level !== this.levels[from + index]) this.paint(span, level);
      });
    }
    this.levels = levels;
  }

  span(position) {
    const entry = this.blocks[this.blockOf[position]];
    this.fill(entry);
    return entry.spans[position - entry.from];
  }

  pin(position) {
    this.span(this.pinned).classList.remove("current");
    this.pinned = Math.max(0, Math.min(this.run.tokens - 1, position));
    this.span(this.pinned).classList.add("current");
    this.onToken(this.pinned);
  }

  // Scrolls so that the token is in the lower part of the view.
  follow(position) {
    const span = this.span(Math.max(0, Math.min(this.run.tokens - 1, position)));
    const top = span.offsetTop - this.host.offsetTop;
    const away = top - this.host.scrollTop;
    if (away < 0 || away > this.host.clientHeight * 0.85) this.host.scrollTop = top - this.host.clientHeight * 0.7;
  }

  listen() {
    const {host} = this;
    const steps = {ArrowRight: 1, ArrowLeft: -1, PageDown: 50, PageUp: -50, Home: -Infinity, End: Infinity};
    host.addEventListener("pointerover", (event) => {
      if (event.target.position !== undefined) this.onToken(event.target.position);
    });
    host.addEventListener("pointerleave", () => this.onToken(this.pinned));
    host.addEventListener("click", (event) => {
      if (event.target.position !== undefined) this.pin(event.target.position);
    });
    host.addEventListener("keydown", (event) => {
      if (!(event.key in steps)) return;
      event.preventDefault();
      this.pin(this.pinned + steps[event.key]);
      this.span(this.pinned).scrollIntoView({block: "nearest"});
    });
  }
}
