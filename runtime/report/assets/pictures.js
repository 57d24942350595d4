"use strict";

// A picture as the encoder saw it, and over it a square for each of its rows.
class PictureView {
  constructor(picture, {onRow, onLeave, onEnter}) {
    Object.assign(this, {picture, onRow, onLeave, onEnter, pinned: 0, counts: null});
    this.rows = picture.down * picture.across;
    const across = picture.across * picture.side, down = picture.down * picture.side;
    this.size = `${across} × ${down} pixels`;
    this.figure = element("figure", "picture");
    this.frame = element("div", "picture-frame");
    this.frame.tabIndex = 0;
    this.frame.setAttribute("role", "group");
    this.frame.setAttribute("aria-label", `${picture.label}. Arrow keys: from row to row; Enter: move the stream to it`);
    this.frame.style.aspectRatio = `${across} / ${down}`;
    this.image = element("img");
    this.image.src = `data:image/png;base64,${picture.png}`;
    this.image.alt = `${picture.label} as the encoder saw it`;
    this.canvas = element("canvas");
    this.canvas.setAttribute("role", "img");
    this.marker = element("div", "patch-mark");
    this.marker.hidden = true;
    this.caption = element("figcaption");
    this.frame.append(this.image, this.canvas, this.marker);
    this.figure.append(this.frame, this.caption);
    this.listen();
  }

  // The longer side gets `most` pixels of the window.
  resize(most) {
    const {down, across} = this.picture;
    const width = Math.round(across >= down ? most : (most * across) / down);
    this.frame.style.width = `${width}px`;
    this.figure.style.width = `${Math.max(width, Math.min(most, 160))}px`;
  }

  listen() {
    const {frame} = this, {across} = this.picture;
    const steps = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across, Home: -Infinity, End: Infinity};
    frame.addEventListener("pointermove", (event) => this.onRow(this.rowAt(event)));
    frame.addEventListener("pointerleave", () => this.onLeave());
    frame.addEventListener("click", (event) => this.pin(this.rowAt(event)));
    frame.addEventListener("focus", () => this.onRow(this.pinned));
    frame.addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.onEnter(this.pinned);
      if (!(event.key in steps)) return;
      event.preventDefault();
      this.pin(this.pinned + steps[event.key]);
    });
  }

  pin(row) {
    this.pinned = Math.max(0, Math.min(this.rows - 1, row));
    this.onRow(this.pinned);
  }

  rowAt(event) {
    const box = this.frame.getBoundingClientRect(), {down, across} = this.picture;
    const cell = (offset, size, count) => Math.max(0, Math.min(count - 1, Math.floor((offset / size) * count)));
    return cell(event.clientY - box.top, box.height, down) * across + cell(event.clientX - box.left, box.width, across);
  }

  mark(row) {
    const {down, across} = this.picture, {style} = this.marker;
    this.marker.hidden = row < 0;
    style.left = `${((row % across) / across) * 100}%`;
    style.top = `${(Math.floor(row / across) / down) * 100}%`;
    style.width = `${100 / across}%`;
    style.height = `${100 / down}%`;
  }

  // `counts`: per row how many of `of` heads hold it, or UNREAD.
  show(counts, of, overlay) {
    Object.assign(this, {counts, of, overlay});
    const read = counts.filter((count) => count !== UNREAD), held = read.filter((count) => count > 0);
    const mean = read.reduce((sum, count) => sum + count, 0) / (read.length || 1);
    let state = "not read yet";
    if (held.length) {
      const rows = `${grouped.format(read.length)} rows${read.length < this.rows ? " read so far" : ""}`;
      state = `${grouped.format(held.length)} of ${rows} held, by ${grouped.format(mean)} of ${of} ${of === 1 ? "head" : "heads"} on average`;
    } else if (read.length) state = "all rows gone";
    this.caption.replaceChildren(element("b", "", this.picture.label), `, ${this.size}: ${state}`);
    this.canvas.setAttribute("aria-label", `${this.picture.label}: ${state}`);
    if (this.visible) this.paint();
  }

  paint() {
    const {canvas, counts, of} = this, {down, across} = this.picture;
    const scale = devicePixelRatio || 1, width = this.frame.clientWidth, height = this.frame.clientHeight;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    if (!this.overlay) return;
    const style = getComputedStyle(document.body), card = style.getPropertyValue("--card"), lines = style.getPropertyValue("--soft");
    const edge = (index, size, count) => Math.round((index * size) / count);
    const cell = Math.min(width / across, height / down), size = Math.min(14, cell * 0.42);
    Object.assign(context, {textAlign: "center", textBaseline: "middle", font: `600 ${size}px sans-serif`, lineJoin: "round"});
    for (let row = 0; row < this.rows; row++) {
      const column = row % across, line = Math.floor(row / across), count = counts[row];
      if (count === UNREAD) continue;
      const [x, y] = [edge(column, width, across), edge(line, height, down)];
      const [right, bottom] = [edge(column + 1, width, across), edge(line + 1, height, down)];
      context.globalAlpha = count ? 0.62 : 0.86;
      context.fillStyle = count ? mapColour(count / of) : card;
      context.fillRect(x, y, right - x, bottom - y);
      if (cell > 8) {
        Object.assign(context, {globalAlpha: 0.5, strokeStyle: lines, lineWidth: 1});
        context.strokeRect(x + 0.5, y + 0.5, right - x - 1, bottom - y - 1);
      }
      if (!count || size < 8) continue;
      const ink = inkOn("map", Math.sqrt(count / of));
      Object.assign(context, {globalAlpha: 1, strokeStyle: ink === "#000" ? "#fff" : "#000", fillStyle: ink, lineWidth: 3});
      context.strokeText(count, (x + right) / 2, (y + bottom) / 2);
      context.fillText(count, (x + right) / 2, (y + bottom) / 2);
    }
  }
}
