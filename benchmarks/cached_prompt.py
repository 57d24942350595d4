"""Starting from a saved context against reading it: seconds to the first token, and the size of the file.

    python benchmarks/cached_prompt.py      # about a minute

``tiny`` reads a text of 50,000 tokens and makes one token; then the session loads the saved state and makes the same
one, and once more with a question in between, as one would use it. All are timed in one process whose engine is open.
The command line pays for starting Python and opening the artefact too, saved session or not: it is timed apart.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

from common import ENGINES, exported, median, parser, save

from trimkv_edge.models.tiny.demo import demo_text
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.session import Session


def command_seconds(folder: Path, engine: str, *arguments: object) -> float:
    """Of a whole ``trimkv-run``."""
    line = [sys.executable, "-m", "trimkv_edge.cli.run", folder, "--engine", engine, "--max-new-tokens", 1, *arguments]
    begun = time.perf_counter()
    subprocess.run(list(map(str, line)), check=True, capture_output=True)
    return time.perf_counter() - begun


def main() -> None:
    options = parser("First token of a saved context against reading it", "cached_prompt")
    options.add_argument("--tokens", type=int, default=50_000)
    options.add_argument("--repeats", type=int, default=9)
    args = options.parse_args()
    results = {}
    with exported(budget="128", buffer=128) as folder, tempfile.TemporaryDirectory() as scratch:
        artefact, path, text = Artefact.load(folder), Path(scratch) / "state", Path(scratch) / "text"
        assert artefact.tokenizer is not None
        demo = demo_text(args.tokens)
        words, question = demo.text, artefact.tokenizer.encode(demo.questions[0], add_special_tokens=False)
        text.write_text(words, encoding="utf-8")
        tokens = artefact.tokenizer.encode(words)
        for name in ENGINES:
            session = Session.open(artefact, name, args.threads)
            begun = time.perf_counter()
            session.feed(tokens)
            (first,) = session.generate(1)
            read = time.perf_counter() - begun
            saved, loaded, asked = [], [], []
            for _ in range(args.repeats):
                begun = time.perf_counter()
                session.save(path)
                saved.append(time.perf_counter() - begun)
            session.reset()
            session.feed(tokens)
            session.save(path)  # before the first token
            for _ in range(args.repeats):
                session.reset()
                begun = time.perf_counter()
                session.load(path)
                (piece,) = session.generate(1)
                loaded.append(time.perf_counter() - begun)
                assert piece == first
                session.reset()
                begun = time.perf_counter()
                session.load(path)
                session.feed(question)
                next(session.generate(1))
                asked.append(time.perf_counter() - begun)
            data = path.read_bytes()
            results[name] = {
                "tokens": len(tokens),
                "file_bytes": len(data),
                "file_bytes_after_zlib": len(zlib.compress(data, 6)),
                "cache_bytes": artefact.manifest.bytes.cache,
                "read_to_first_token_s": round(read, 4),
                "load_to_first_token_s": round(median(loaded), 5),
                "load_and_ask_to_first_token_s": round(median(asked), 5),
                "load_share": round(median(loaded) / read, 6),
                "load_and_ask_share": round(median(asked) / read, 6),
                "save_s": round(median(saved), 5),
                "command_reading_s": round(command_seconds(folder, name, "--prompt-file", text), 3),
                "command_loading_s": round(command_seconds(folder, name, "--session", path), 3),
            }
            print(name, results[name], flush=True)
    save(args.output, "cached_prompt", results)


if __name__ == "__main__":
    main()
