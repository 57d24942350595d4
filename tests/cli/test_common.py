"""How commands end, whatever happens in them."""

from __future__ import annotations

import pytest

from trimkv_edge.cli.common import run_cli
from trimkv_edge.errors import ConfigError


def end(error: BaseException) -> int:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as found:
        run_cli(fail)
    assert isinstance(found.value.code, int)
    return found.value.code


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("two\n  lines"), 2, "error: two lines"),
        (
            PermissionError(13, "Permission denied", "x"),
            2,
            "error: [Errno 13] Permission denied: 'x'",
        ),
        (MemoryError(), 2, "error: out of memory: free memory or choose a smaller budget or model"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyError("k"), 70, "internal error: KeyError: 'k' (run with TRIMKV_DEBUG=1 for the traceback)"),
    ],
)
def test_failures_are_one_line_and_a_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRIMKV_DEBUG", raising=False)
    assert end(error) == code
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize("error", [ConfigError("x"), KeyError("k"), OSError("disk")])
def test_debug_raises_what_happened(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMKV_DEBUG", "1")
    with pytest.raises(type(error)):
        run_cli(lambda: (_ for _ in ()).throw(error))


def test_success_returns(capsys: pytest.CaptureFixture[str]) -> None:
    run_cli(lambda: print("done"))
    assert capsys.readouterr().out == "done\n"
