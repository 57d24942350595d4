"use strict";

// Scales whose lightness rises or falls steadily, so that they can be read without telling hues apart.
const SCALES = {
  light: {
    map: ["#f3f8fb", "#bfe3dc", "#6cbcc9", "#2a84b3", "#0b4a86", "#08244f"],
    text: ["#e4f3f1", "#b3e0da", "#7cc8d2", "#58afd6"],
    lines: ["#0b2a5c", "#2b6a9c", "#2a9c8d", "#7aa52f", "#b88a00"],
  },
  dark: {
    map: ["#161d26", "#17405e", "#1b6f91", "#36a3ae", "#8fd6bd", "#e8fbe9"],
    text: ["#1b2f3a", "#1a4557", "#195a73", "#1a6f8d"],
    lines: ["#8fb8ff", "#5fc8e8", "#58dcb4", "#b4e06a", "#ffd766"],
  },
};
const darkScheme = matchMedia("(prefers-color-scheme: dark)");

function parts(colour) {
  return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
}

// The colour of `value` (0 to 1) as [red, green, blue].
function mix(scale, value) {
  const place = Math.max(0, Math.min(1, value)) * (scale.length - 1);
  const low = Math.min(Math.floor(place), scale.length - 2);
  const [from, to] = [parts(scale[low]), parts(scale[low + 1])];
  return from.map((part, index) => Math.round(part + (to[index] - part) * (place - low)));
}

function scale(name) {
  return SCALES[darkScheme.matches ? "dark" : "light"][name];
}

function colour(name, value) {
  return `rgb(${mix(scale(name), value).join(" ")})`;
}

function luminance(rgb) {
  const linear = rgb.map((part) => (part <= 10 ? part / 3294.6 : ((part / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
}

// Maps spread low values: what is held by few heads, or by heads that hold little, should differ too.
function mapColour(share) {
  return colour("map", Math.sqrt(share));
}

// A key from `low` to `high` for a map.
function mapKey(low, high) {
  const out = element("span", "gradient"), bar = element("i");
  const stops = Array.from({length: 11}, (_, step) => mapColour(step / 10));
  bar.style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
  out.append(low, bar, high);
  return out;
}

// Black or white, whichever can be read on the colour.
function inkOn(name, value) {
  return luminance(mix(scale(name), value)) > 0.18 ? "#000" : "#fff";
}
