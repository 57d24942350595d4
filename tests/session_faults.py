"""What can go wrong with a session file, done on purpose; shared by tests and ``benchmarks/session_faults.py``.

Run as a command it is the process that others kill, fill up or lock out: it needs numpy and the runtime only.
"""

from __future__ import annotations

import os
import random
import resource
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import CacheState
from trimkv_edge.errors import SessionError
from trimkv_edge.runtime.place import Place
from trimkv_edge.runtime.session_file import Origin, Record, SessionFile, read_session

CONFIG = CacheConfig(budget=64, buffer=64, prefill_chunk=64)
ORIGIN = Origin("made up", "ab" * 32, "none float32", "rg", "cd" * 32, "default", "", CONFIG)
ROWS, DIM, VOCAB = (4, 2), 32, 1000


def record(number: int, live: int = 100) -> Record:
    """Session ``number``: every array is drawn from it, so parts of two sessions never fit together."""
    draw = np.random.default_rng(number)
    shape = (*ROWS, live)
    tables = [draw.normal(size=size).astype(np.float32) for size in ((*shape, DIM), (*shape, DIM), shape)]
    positions = np.broadcast_to(np.arange(live), shape).copy()
    state = CacheState(live, *tables, positions)
    seen_tokens = draw.integers(0, 256, VOCAB // 8, dtype=np.uint8)
    place = Place(live, number % VOCAB, (1, 2, 3), draw.normal(size=VOCAB).astype(np.float32), seen_tokens, None)
    return Record(place, state)


def same(one: Record, other: Record) -> bool:
    """Every array and number."""
    pairs = [
        *((getattr(one.state, name), getattr(other.state, name)) for name in ("key", "value", "log_beta", "positions")),
        (one.place.logits, other.place.logits),
        (one.place.seen_tokens, other.place.seen_tokens),
    ]
    return one.place.pending == other.place.pending and all(np.array_equal(a, b) for a, b in pairs)


def kills(path: Path, count: int, seed: int = 0) -> dict[str, int]:
    """Kills ``count`` processes that save without pause, at random moments, and reads what each left.

    Returns:
        How often the file was the ``old`` one (the last whose save had ended), the ``new`` one (being saved), or
        ``neither``; how often the killed process left an unfinished file ``beside`` it; and other files left at the
        ``end``, after one more save.
    """
    found: Counter[str] = Counter(old=0, new=0, neither=0, beside=0, end=0)
    chance, number = random.Random(seed), 1
    SessionFile(path).write(record(0), ORIGIN)
    took = []
    for _ in range(5):
        begun = time.perf_counter()
        SessionFile(path).write(record(0), ORIGIN)
        took.append(time.perf_counter() - begun)
    old = 0
    for _ in range(count):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            _save_for_ever(path, number, writer)
        os.close(writer)
        select.select([reader], [], [], 30)
        time.sleep(chance.uniform(0, 3 * sorted(took)[2]))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        said = b"".join(iter(lambda fd=reader: os.read(fd, 2**16), b"")).decode().split()
        os.close(reader)
        ended = [int(word[1:]) for word in said if word[0] == "e"]
        old = ended[-1] if ended else old
        begun_last = int(said[-1][1:]) if said and said[-1][0] == "b" else old
        found["beside"] += path.with_name(f".{path.name}.tmp").exists()
        try:
            left = read_session(path, ORIGIN)
            which = "old" if same(left, record(old)) else "new" if same(left, record(begun_last)) else "neither"
        except SessionError:
            which = "neither"
        found[which] += 1
        if which == "new":
            old = begun_last
        number = begun_last + 1
    SessionFile(path).write(record(0), ORIGIN)
    found["end"] = len(os.listdir(path.parent)) - 1
    return dict(found)


def _save_for_ever(path: Path, number: int, writer: int) -> None:
    with SessionFile(path).open() as file:
        while True:
            what = record(number)
            os.write(writer, f"b{number} ".encode())
            file.write(what, ORIGIN)
            os.write(writer, f"e{number} ".encode())
            number += 1


def damages(path: Path, count: int, seed: int = 0) -> dict[str, int]:
    """Flips one bit (half of the times; half of those in the first 2,000 bytes), or cuts the file at a random place.

    Returns:
        How many were ``refused`` with an error of ours, were ``accepted``, or raised anything ``other``.
    """
    good, chance = path.read_bytes(), random.Random(seed)
    found: Counter[str] = Counter(refused=0, accepted=0, other=0)
    broken = path.with_name("broken")
    for turn in range(count):
        if turn % 2:
            data = good[: chance.randrange(len(good))]
        else:
            place = chance.randrange(2_000 if turn % 4 else len(good))
            data = good[:place] + bytes([good[place] ^ 1 << chance.randrange(8)]) + good[place + 1 :]
        broken.write_bytes(data)
        try:
            read_session(broken, ORIGIN)
            found["accepted"] += 1
        except SessionError as error:
            found["refused" if "\n" not in str(error) else "other"] += 1
        except Exception:
            found["other"] += 1
    broken.unlink()
    return dict(found)


def full_disk(path: Path, sizes: list[int]) -> dict[str, int]:
    """Saves over an old file where no file may grow beyond each of ``sizes`` bytes.

    Returns:
        How often the save was ``refused`` with an error of ours, the old file was ``kept`` and ``nothing`` was left
        beside it.
    """
    found: Counter[str] = Counter(refused=0, kept=0, nothing=0)
    SessionFile(path).write(record(0), ORIGIN)
    before = path.read_bytes()
    for size in sizes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            SessionFile(path).write(record(1), ORIGIN)
        except SessionError as error:
            found["refused"] += "cannot be saved (" in str(error) and "\n" not in str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        found["kept"] += path.read_bytes() == before
        found["nothing"] += os.listdir(path.parent) == [path.name]
    return dict(found)


def second_process(path: Path) -> str:
    """What a second process is told while this one has the file."""
    with SessionFile(path).open():
        done = subprocess.run(
            [sys.executable, __file__, "save", str(path)], capture_output=True, text=True, timeout=60, check=True
        )
    return done.stdout.strip()


def main() -> None:
    """``kills PATH COUNT SEED``, ``full PATH SIZE...`` or ``save PATH``; prints what was found."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    what, path, *numbers = sys.argv[1:]
    if what == "kills":
        print(kills(Path(path), *map(int, numbers)))
    elif what == "full":
        print(full_disk(Path(path), list(map(int, numbers))))
    else:
        try:
            SessionFile(path).write(record(1), ORIGIN)
            print("saved")
        except SessionError as error:
            print(error)


if __name__ == "__main__":
    main()
