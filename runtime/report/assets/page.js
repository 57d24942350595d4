"use strict";

const $ = (id) => document.getElementById(id);

class Page {
  constructor(run) {
    this.run = run;
    this.seen = run.tokens;
    this.layer = this.head = -1;
    this.token = 0;
    this.shortest = Math.max(1, Math.floor((run.events.length > 1 ? run.events[1] - run.events[0] : run.tokens / 10) / 2));
    const go = (seen) => this.go(seen);
    this.facts();
    this.text = new TextView($("text"), run, (position) => this.describe(position));
    this.overview = new Overview($("raster"), run, go);
    this.heat = new HeatMap($("heat"), run, (layer, head) => this.toggleHead(layer, head));
    this.survival = new SurvivalChart($("survival"), $("survival-readout"), run);
    this.departures = new DepartureCharts([$("ages"), $("counts")], $("departures-readout"), run, go);
    this.machine = new MachineCharts([$("entries"), $("memory"), $("speed")], $("machine-readout"), run, go);
    this.listen();
    this.choose();
  }

  facts() {
    const {data} = this.run;
    for (const [label, value] of data.facts) {
      const pair = element("div");
      pair.append(element("dt", "", label), element("dd", "", value));
      $("facts").append(pair);
    }
    for (const note of data.notes) $("notes").append(element("p", "note", note));
    const fill = (select, count, name) => {
      select.append(new Option("all", -1));
      for (let index = 0; index < count; index++) select.append(new Option(name(index), index));
    };
    fill($("layer"), this.run.layers, String);
    fill($("head"), this.run.heads, (index) => data.heads[index]);
    $("time").max = this.run.tokens;
    $("time").value = this.run.tokens;
  }

  listen() {
    $("time").addEventListener("input", (event) => this.go(Number(event.target.value)));
    $("layer").addEventListener("change", () => this.choose());
    $("head").addEventListener("change", () => this.choose());
    $("play").addEventListener("click", () => (this.playing ? this.stop() : this.play()));
    document.querySelectorAll("input[type=radio]").forEach((input) => input.addEventListener("change", () => this.update()));
    $("text").addEventListener("keydown", (event) => event.key === "Enter" && this.go(this.token + 1));
    darkScheme.addEventListener("change", () => this.choose());
    let width = document.body.clientWidth;
    addEventListener("resize", () => {
      if (document.body.clientWidth === width) return;
      width = document.body.clientWidth;
      clearTimeout(this.resized);
      this.resized = setTimeout(() => this.choose(), 120);
    });
  }

  toggleHead(layer, head) {
    const same = this.layer === layer && this.head === head;
    $("layer").value = same ? -1 : layer;
    $("head").value = same ? -1 : head;
    this.choose();
  }

  // Draws everything for the chosen heads.
  choose() {
    this.layer = Number($("layer").value);
    this.head = Number($("head").value);
    this.chosen = this.run.chosen(this.layer, this.head);
    this.overview.draw(this.chosen);
    this.heat.layout();
    this.survival.draw(this.layer, this.head);
    this.departures.draw(this.chosen);
    this.machine.draw();
    this.repaint = true;
    this.update();
  }

  go(seen) {
    this.seen = Math.max(1, Math.min(this.run.tokens, seen));
    $("time").value = this.seen;
    if (!this.due) this.due = requestAnimationFrame(() => this.update(true));
  }

  play() {
    this.playing = true;
    $("play").textContent = "❚❚";
    $("play").setAttribute("aria-label", "Pause");
    if (this.seen >= this.run.tokens) this.go(1);
    let before = performance.now(), place = this.seen;
    const frame = (now) => {
      if (!this.playing) return;
      // The slider may have been moved meanwhile.
      if (Math.abs(place - this.seen) > 1) place = this.seen;
      place += ((now - before) / 25000) * this.run.tokens;
      before = now;
      this.go(Math.floor(place));
      if (this.seen >= this.run.tokens) this.stop();
      else requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
  }

  stop() {
    this.playing = false;
    $("play").textContent = "▶";
    $("play").setAttribute("aria-label", "Play");
  }

  // Draws what depends on the place in the stream.
  update(moved) {
    this.due = 0;
    const {run, seen} = this;
    const events = last(run.events, seen) + 1;
    $("where").textContent = `${grouped.format(seen)} of ${grouped.format(run.tokens)}, ${grouped.format(events)} ${events === 1 ? "event" : "events"}`;
    this.shade();
    this.heat.draw(run.census(seen), document.querySelector("input[name=measure]:checked").value, this.chosen);
    this.overview.at(seen);
    this.departures.at(seen);
    this.machine.at(seen);
    this.describe(this.token);
    if (moved && $("follow").checked) this.text.follow(seen - 1);
  }

  shade() {
    const {run, seen, chosen} = this, count = chosen.length;
    const byStay = document.querySelector("input[name=shade]:checked").value === "stay";
    const holders = run.holders(seen, chosen);
    const levels = new Int8Array(run.tokens).fill(UNREAD);
    if (byStay) {
      const stays = run.stays(seen, chosen);
      for (let p = 0; p < seen; p++) levels[p] = Math.round(this.stayLevel(stays[p]) * LEVELS);
    } else {
      for (let p = 0; p < seen; p++) levels[p] = holders[p] ? Math.round((holders[p] / count) * LEVELS) : GONE;
    }
    this.text.shade(levels, this.repaint);
    this.repaint = false;
    this.legend(byStay, count);
  }

  // 0 to 1 on a logarithmic scale, from half the distance of events to the whole stream.
  stayLevel(stay) {
    const {shortest} = this;
    return stay <= shortest ? 0 : Math.log(stay / shortest) / Math.log(this.run.tokens / shortest);
  }

  legend(byStay, count) {
    const swatch = (label, level, kind = "") => {
      const out = element("span", `swatch ${kind}`, label);
      if (level !== undefined) out.style.background = colour("text", level);
      return out;
    };
    const {run} = this, items = [];
    if (byStay) {
      const {shortest} = this, steps = [];
      for (let stay = 10; stay < run.tokens; stay *= 10) if (stay > shortest) steps.push(stay);
      items.push(swatch(`up to ${grouped.format(shortest)}`, 0));
      for (const stay of steps) items.push(swatch(grouped.format(stay), this.stayLevel(stay)));
      items.push(element("span", "unit", "tokens on average"));
    } else {
      items.push(swatch("none", undefined, "gone"));
      const steps = Math.min(count, 4);
      for (let step = 1; step <= steps; step++) items.push(swatch(`${Math.round((step / steps) * count)}`, step / steps));
      items.push(element("span", "unit", count === 1 ? "head" : "heads"));
    }
    items.push(swatch("not read yet", undefined, "unread"));
    if (run.data.promptTokens < run.tokens) items.push(swatch("generated", undefined, "made"));
    $("legend").replaceChildren(...items);
  }

  // What became of one token, layer by layer.
  describe(position) {
    this.token = position;
    const {run, seen} = this, {text, special} = run.data;
    const name = text[position] === "" ? "part of a character" : text[position].replaceAll("\n", "↵");
    const title = element("p", "token-title");
    title.append(element("b", "", `${grouped.format(position + 1)}`), " ", element("code", "", name));
    if (special.includes(position)) title.append(" special token");
    const box = element("div", "scroll");
    if (position >= seen) title.append(" has not been read yet.");
    else box.append(this.stays(position, title));
    $("token").replaceChildren(title, box);
  }

  stays(position, title) {
    const {run, seen} = this, on = new Set(this.chosen);
    const table = element("table", run.layers > 12 ? "dense" : ""), top = table.createTHead().insertRow();
    const corner = element("th", "", run.layers > 12 ? "tokens held for, by layer" : "tokens held for");
    top.append(corner);
    for (let layer = 0; layer < run.layers; layer++) top.append(element("th", "", run.layers > 12 ? layer : `layer ${layer}`));
    const body = table.createTBody();
    let holders = 0, of = 0;
    for (let head = 0; head < run.heads; head++) {
      const line = body.insertRow();
      const side = element("th", "", `head ${run.data.heads[head]}`);
      side.scope = "row";
      line.append(side);
      for (let layer = 0; layer < run.layers; layer++) {
        const row = layer * run.heads + head, left = run.left[position * run.rows + row];
        const held = left > seen, stay = Math.min(left, seen) - position;
        const cell = line.insertCell();
        cell.textContent = short.format(stay) + (held ? " ●" : "");
        cell.className = on.has(row) ? "" : "off";
        if (on.has(row)) {
          cell.style.background = colour("text", this.stayLevel(stay));
          of++;
          holders += held;
        }
      }
    }
    title.append(` held by ${grouped.format(holders)} of ${grouped.format(of)} ${of === 1 ? "head" : "heads"} now (●)`);
    return table;
  }
}
