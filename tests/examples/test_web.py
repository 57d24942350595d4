"""``examples/web``: the same survivors and tokens as in Python, and a page whose memory does not grow."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browser import browser_page
from tiny_host import CONFIG, Decoded, decoded, tiny_host
from web_example import WEB, need_node, need_packages, run_node, serving

from trimkv_edge.models.eager import EagerEngine
from trimkv_edge.models.loading import load_model
from trimkv_edge.models.source import find_source
from trimkv_edge.models.tiny.demo import demo_text
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.chat import render_chat
from trimkv_edge.runtime.engines import load_engine
from trimkv_edge.runtime.session import Session

if TYPE_CHECKING:
    from playwright.sync_api import Page

NEW = 150
TEXT = "import os\n\n\ndef main() -> None:\n"
# Notes every memory that WebAssembly gets, before the page's own scripts run.
WATCH = """
  const Memory = WebAssembly.Memory;
  window.memories = [];
  WebAssembly.Memory = class extends Memory {
    constructor(descriptor) { super(descriptor); window.memories.push(this); }
  };
"""
WASM = "window.memories.reduce((sum, memory) => sum + memory.buffer.byteLength, 0)"


def stream() -> list[int]:
    """Facts, text and a question: over 500 tokens."""
    tokenizer = Artefact.load(tiny_host()).tokenizer
    assert tokenizer is not None
    demo = demo_text(450)
    return tokenizer.encode(demo.text + demo.questions[0])


@pytest.fixture(scope="module")
def wanted() -> Decoded:
    """What the host of this package does, which torch's engine confirms."""
    tokens = stream()
    assert len(tokens) > 450
    made = decoded(load_engine(Artefact.load(tiny_host())), tokens, NEW)
    assert made == decoded(EagerEngine(load_model(find_source("tiny")).model, CONFIG), tokens, NEW)
    assert len(made.events) >= 12
    return made


@pytest.mark.parametrize("runtime", ["node", "web"])
def test_javascript_keeps_and_says_what_python_does(runtime: str, wanted: Decoded, tmp_path: Path) -> None:
    need_packages()
    file = tmp_path / "stream.json"
    file.write_text(json.dumps({"tokens": stream(), "new": NEW}))
    found: dict[str, Any] = json.loads(run_node("check.js", tiny_host(), file, runtime))
    assert [(event["seen"], event["kept"]) for event in found["events"]] == wanted.events
    assert found["said"] == wanted.said
    tokenizer = Artefact.load(tiny_host()).tokenizer
    assert tokenizer is not None
    assert found["text"] == tokenizer.decode(wanted.said)
    assert (runtime == "web") == (found["wasm"][0] > 0)
    assert len(set(found["wasm"])) == 1, "WebAssembly's memory grew after the first event"


def test_the_host_in_javascript_passes_the_test_vectors() -> None:
    need_node()
    vectors = WEB.parents[1] / "docs" / "npu" / "vectors.json"
    streams = json.loads(vectors.read_text())["streams"]
    assert json.loads(run_node("vectors.js", vectors)) == {"streams": len(streams) - 1, "skipped": ["random"]}


def test_packages_are_pinned_and_come_from_any_registry() -> None:
    wanted = json.loads((WEB / "package.json").read_text())
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in wanted["dependencies"].values())
    lock = (WEB / "package-lock.json").read_text()
    assert "resolved" not in lock
    assert "://" not in re.sub(r'"(url|funding)": "https://[^"]*"', "", lock)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(tiny_host()) as url:
        yield url


@pytest.fixture
def opened(address: str) -> Iterator[Page]:
    """The page with its artefact; it has to end without a complaint."""
    with browser_page(viewport={"width": 1280, "height": 800}) as (page, troubles):
        page.add_init_script(WATCH)
        page.goto(address)
        until(page, "ready")
        yield page
        assert troubles == []


def until(page: Page, state: str) -> None:
    page.wait_for_function(
        "state => document.getElementById('state').textContent === state", arg=state, timeout=120_000
    )


def send(page: Page, prompt: str, kind: str, most: int) -> None:
    page.check(f"input[value={kind}]")
    page.fill("#prompt", prompt)
    page.fill("#most", str(most))
    page.click("#send")


def test_the_page_says_what_python_says_and_its_memory_stays(opened: Page) -> None:
    artefact = Artefact.load(tiny_host())
    assert artefact.tokenizer is not None
    session = Session.open(artefact)
    session.feed(artefact.tokenizer.encode(TEXT))
    want = [piece.token for piece in session.generate(1300)]

    devtools = opened.context.new_cdp_session(opened)

    def memory() -> tuple[int, int]:
        """Bytes of WebAssembly, and of what JavaScript still holds, arrays included."""
        devtools.send("HeapProfiler.collectGarbage")
        usage = devtools.send("Runtime.getHeapUsage")
        held = int(usage["usedSize"] + usage.get("backingStorageSize", 0))
        return int(opened.evaluate(WASM)), held

    send(opened, TEXT, "text", 200)
    until(opened, "ready, 200 tokens written")
    early = memory()
    text = opened.locator("#log .answer").inner_text()
    assert text.rstrip() == artefact.tokenizer.decode(want[:200]).rstrip()

    opened.click("#new")
    send(opened, TEXT, "text", 1300)
    until(opened, "ready, 1,300 tokens written")
    late = memory()
    text = opened.locator("#log .answer").inner_text()
    assert text.rstrip() == artefact.tokenizer.decode(want).rstrip()
    statistics = session.statistics()
    assert int(opened.inner_text("#seen").replace(",", "")) == statistics.position
    assert int(opened.inner_text("#events")) == statistics.events >= 30
    assert early[0] == late[0] > 10_000_000
    # 1,100 tokens more would be 4.4 MB more in a cache that keeps all.
    assert late[1] - early[1] < 500_000


def test_a_conversation_has_the_tokens_that_python_gives_it(opened: Page) -> None:
    artefact = Artefact.load(tiny_host())
    assert artefact.tokenizer is not None
    assert artefact.chat_template is not None
    messages: list[dict[str, str]] = []
    for prompt in ("Remember: the gate is owl.", "What is the gate?"):
        messages.append({"role": "user", "content": prompt})
        send(opened, prompt, "message", 50)
        opened.wait_for_function("document.getElementById('state').textContent.startsWith('ready, ')")
        opened.wait_for_selector("#send:enabled")
        answer = opened.locator("#log .answer").last.inner_text()
        prompt_ids = artefact.tokenizer.encode(
            render_chat(artefact.chat_template, messages, artefact.special_tokens()), add_special_tokens=False
        )
        session = Session.open(artefact)
        session.feed(prompt_ids)
        said = "".join(piece.text for piece in session.generate(50, stop_ids=[2]))
        assert answer == said
        messages.append({"role": "assistant", "content": said})
        assert int(opened.inner_text("#seen").replace(",", "")) == session.engine.seen
    assert messages[-1]["content"] == "The gate is owl."


def test_stop_and_a_new_stream(opened: Page) -> None:
    send(opened, TEXT, "text", 1_000_000)
    opened.wait_for_function("Number(document.getElementById('seen').textContent.replace(',', '')) > 60")
    opened.click("#stop")
    opened.wait_for_selector("#send:enabled")
    assert 10 < int(re.sub(r"\D", "", opened.inner_text("#state"))) < 1_000_000
    opened.click("#new")
    assert opened.locator("#log p").count() == 0
    opened.wait_for_function("document.getElementById('seen').textContent === '0'")


def test_an_artefact_can_be_chosen_from_a_folder(opened: Page, tmp_path: Path) -> None:
    opened.set_input_files("#folder", tiny_host())
    until(opened, "ready")
    assert opened.inner_text("#trouble") == ""
    (tmp_path / "notes.txt").write_text("nothing")
    opened.set_input_files("#folder", tmp_path)
    until(opened, "no artefact")
    assert "the folder has no manifest.json" in opened.inner_text("#trouble")
    assert opened.is_disabled("#send")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window_and_dark_colours(address: str, scheme: str) -> None:
    with browser_page(viewport={"width": 360, "height": 740}, color_scheme=scheme) as (page, troubles):
        page.goto(address)
        until(page, "ready")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        unnamed = page.evaluate(
            "[...document.querySelectorAll('input, textarea, button')].filter((one) => "
            "!one.labels?.length && !one.textContent.trim()).length"
        )
        assert unnamed == 0
        assert troubles == []


def test_the_server_gives_files_of_its_two_folders_only(address: str) -> None:
    def status(path: str) -> int:
        try:
            with urllib.request.urlopen(f"{address}{path}") as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code

    assert status("artefact/manifest.json") == 200
    outside = f"artefact/%2e%2e%2f{tiny_host().name}%2fmanifest.json"
    for path in (outside, "..%2flong_text.py", "artefact/", "node_modules/.package-lock.json", "%zz"):
        assert status(path) == 404, path
