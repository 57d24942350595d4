"""What tests of the report do with its page in a browser."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

# Contrast of each text with what is behind it, by WCAG's formula.
CONTRAST = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = (rgb) => {
    const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const part = rgb.slice(0, 3).map((v) => linear(v / 255));
    return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const out = {};
  const see = (element, ink, paper) => {
    const [a, b] = [light(parse(ink)), light(paper)].sort((x, y) => y - x);
    const name = element.tagName + "." + (element.getAttribute("class") || "");
    out[name] = Math.min(out[name] ?? 99, (a + 0.05) / (b + 0.05));
  };
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !element.getClientRects().length || /SCRIPT|OPTION|TITLE|LEGEND/.test(element.tagName)) continue;
    const style = getComputedStyle(element);
    if (element instanceof SVGElement) {
      const cell = element.classList.contains("cell-text") && element.previousElementSibling;
      see(element, style.fill, cell ? parse(getComputedStyle(cell).fill) : behind(element));
    } else see(element, style.color, behind(element));
  }
  return out;
}"""


def open_page(page: Page, file: str) -> None:
    page.goto(file)
    page.evaluate("ready.then(() => 0)")


def move(page: Page, seen: int) -> None:
    page.locator("#time").fill(str(seen))
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def until(page: Page, condition: str) -> None:
    """Waits until a JavaScript condition holds; the page's policy forbids Playwright's own way."""
    for _ in range(500):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(20)
    pytest.fail(f"never came true: {condition}")
