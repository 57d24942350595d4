"""Real text that every Python installation carries: the sources of the standard library, in a fixed order."""

import sysconfig
from functools import lru_cache
from pathlib import Path

# Tests, tables and vendored files: repetitive, or different from one installation to the next.
_SKIPPED_FOLDERS = frozenset(
    [
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "site-packages",
        "dist-packages",
        "encodings",
        "turtledemo",
        "pydoc_data",
        "ensurepip",
        "__pycache__",
    ]
)
HELD_OUT_EVERY = 20


def stdlib_files() -> list[Path]:
    """Sorted pure-Python files of the running interpreter's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if _SKIPPED_FOLDERS.intersection(parts[:-1]) or parts[0].startswith("config-"):
            continue
        if parts[-1].startswith("_sysconfigdata"):  # written by the build of this one interpreter
            continue
        found.append(path)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


@lru_cache(maxsize=2)
def stdlib_texts(held_out: bool = False) -> tuple[str, ...]:
    """Texts of the training files, or with `held_out` of every 20th file, which training never sees."""
    texts = []
    for number, path in enumerate(stdlib_files()):
        if (number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == held_out:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return tuple(texts)
