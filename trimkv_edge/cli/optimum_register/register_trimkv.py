"""What ``optimum-cli`` finds: installed as ``optimum/commands/register/register_trimkv.py``, never imported by us."""

from __future__ import annotations

from optimum.commands.export.base import ExportCommand

from trimkv_edge.cli.optimum import TrimKVExportCommand

REGISTER_COMMANDS = [(TrimKVExportCommand, ExportCommand)]
