"use strict";

// The page of a stream that has pictures.
class PicturePage extends Page {
  // The first draw comes from the constructor of the page without pictures.
  prepare() {
    const {run} = this, {pictures} = run.data;
    this.pictureOf = new Int32Array(run.tokens).fill(-1);
    this.kinds = new KindChart($("kinds"), $("kinds-readout"), run, (seen) => this.go(seen));
    const watch = new IntersectionObserver((found) => found.forEach(({target, isIntersecting}) => {
      const view = this.views[target.index];
      view.visible = isIntersecting;
      if (isIntersecting) view.paint();
    }));
    this.views = pictures.map((picture, index) => {
      const {start, down, across} = picture;
      this.pictureOf.fill(index, start, start + down * across);
      const view = new PictureView(picture, {
        onRow: (row) => this.describe(start + row),
        onLeave: () => this.describe(this.text.pinned),
        onEnter: (row) => this.go(start + row + 1),
      });
      view.figure.index = index;
      $("pictures").append(view.figure);
      return view;
    });
    this.views.forEach((view) => watch.observe(view.figure));
    $("overlay").addEventListener("change", () => this.update());
  }

  choose() {
    if (!this.views) this.prepare();
    const room = $("pictures").clientWidth - 6;
    const most = Math.min(room, this.views.length > 6 ? 168 : this.views.length > 1 ? 232 : 320);
    for (const view of this.views) view.resize(most);
    super.choose();
  }

  update(moved) {
    if (this.drawn !== this.chosen) {
      this.kinds.draw(this.chosen);
      this.patchLegend(this.chosen.length);
      this.drawn = this.chosen;
    }
    for (const view of this.views) view.show(this.counts(view), this.chosen.length, $("overlay").checked);
    this.kinds.at(this.seen);
    super.update(moved);
  }

  // Per row of a picture: how many of the chosen heads hold it.
  counts({picture, rows}) {
    const {run, seen, chosen} = this, out = new Array(rows).fill(UNREAD);
    for (let row = 0, p = picture.start; row < rows && p < seen; row++, p++) {
      let count = 0;
      for (const head of chosen) if (run.left[p * run.rows + head] > seen) count++;
      out[row] = count;
    }
    return out;
  }

  patchLegend(count) {
    const items = [element("span", "swatch gone", "none")], steps = Math.min(count, 4);
    const numbers = new Set(Array.from({length: steps}, (_, step) => Math.round(((step + 1) / steps) * count)));
    for (const number of numbers) {
      const item = element("span", "swatch", grouped.format(number)), level = number / count;
      item.style.background = mapColour(level);
      item.style.color = inkOn("map", Math.sqrt(level));
      items.push(item);
    }
    items.push(element("span", "unit", count === 1 ? "head" : "heads"), element("span", "swatch unread", "no square: not read yet"));
    $("patch-legend").replaceChildren(...items);
  }

  describe(position) {
    super.describe(position);
    const index = this.pictureOf[position];
    this.views.forEach((view, at) => view.mark(at === index ? position - view.picture.start : -1));
    if (index < 0) {
      $("picture-readout").textContent = "Point at a square, or go to it with the arrow keys, to see which row it is and which heads hold it.";
      return;
    }
    const view = this.views[index], {picture} = view, row = position - picture.start;
    const line = Math.floor(row / picture.across), column = row % picture.across, {side} = picture;
    const where = `${picture.label}, row ${row + 1} of ${view.rows} (${line + 1} down, ${column + 1} across)`;
    const pixels = `pixels ${column * side} to ${(column + 1) * side - 1} across, ${line * side} to ${(line + 1) * side - 1} down`;
    const count = view.counts[row], of = this.chosen.length;
    const held = count === UNREAD ? "not read yet" : `held by ${count} of ${of} ${of === 1 ? "head" : "heads"}`;
    $("picture-readout").textContent = `${where}, ${pixels}: ${held}.`;
  }
}
