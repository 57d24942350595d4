"""Session files under every fault that we know to make: no file may be lost, and none that is damaged may be believed.

    python benchmarks/session_faults.py      # about a minute

Kills processes that save without pause, flips bits and cuts files, fills a disk (a limit on file sizes; as root also a
small tmpfs), and asks for one file from two processes. The faults are those of ``tests/session_faults.py``.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import parser, save

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import session_faults
from session_faults import ORIGIN, damages, record, same, second_process

from trimkv_edge.errors import SessionError
from trimkv_edge.runtime.session_file import SessionFile, read_session


def faulty(*arguments: object) -> dict[str, int]:
    """In a process of its own, which is limited or makes others to kill."""
    command = [sys.executable, session_faults.__file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, int] = ast.literal_eval(done.stdout)
    return found


def full_tmpfs(folder: Path) -> dict[str, bool] | None:
    """Saves over an old file on a disk that has no room for two; None where nothing can be mounted."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        return None
    try:
        path = folder / "session"
        SessionFile(path).write(record(0), ORIGIN)
        try:
            SessionFile(path).write(record(1), ORIGIN)
            refused = False
        except SessionError as error:
            refused = "No space left on device" in str(error)
        kept = same(read_session(path, ORIGIN), record(0))
        return {"refused": refused, "kept": kept, "nothing": os.listdir(folder) == [path.name]}
    finally:
        subprocess.run(["umount", folder], check=True)


def main() -> None:
    options = parser("Faults of session files: kills, damage, full disks, two processes", "session_faults")
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--damages", type=int, default=4_000, help="half are bit flips, half cuts")
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        places = [Path(scratch) / name for name in ("kills", "damage", "limit", "tmpfs", "two")]
        for folder in places:
            folder.mkdir()
        killed, damaged, limited, small, two = (folder / "session" for folder in places)
        SessionFile(damaged).write(record(1), ORIGIN)
        size = damaged.stat().st_size
        sizes = np.linspace(0, size - 1, 50).astype(int)
        results = {
            "file_bytes": size,
            "kills": faulty("kills", killed, args.kills, args.seed),
            "damages": damages(damaged, args.damages, args.seed),
            "file_size_limits": {"tried": len(sizes), **faulty("full", limited, *sizes)},
            "full_tmpfs": full_tmpfs(small.parent),
            "second_process": second_process(two).replace(str(two), "FILE").replace(str(os.getpid()), "PID"),
        }
    for name, found in results.items():
        print(name, found)
    save(args.output, "session_faults", results)


if __name__ == "__main__":
    main()
