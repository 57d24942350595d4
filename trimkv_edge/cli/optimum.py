"""``optimum-cli export trimkv``: the same command as ``trimkv-export``, where users of optimum look for it.

optimum reads every module of the namespace package ``optimum.commands.register``; ours is
``optimum_register/register_trimkv.py``. This module needs optimum; nothing else here imports it.
"""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from trimkv_edge.cli.common import run_cli
from trimkv_edge.cli.export import configure, export


class TrimKVExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum has no types
    """The subcommand; optimum makes one instance for the parser and one to run."""

    COMMAND = CommandInfo(
        name="trimkv", help="Export a model with retention gates to ExecuTorch and ONNX, with a KV cache of fixed size."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Adds the options of ``trimkv-export``."""
        configure(parser)
        parser.epilog = (parser.epilog or "").replace("trimkv-export", "optimum-cli export trimkv")

    def run(self) -> None:
        """Runs the export; ends as ``trimkv-export`` does."""
        run_cli(lambda: export(self.args))
