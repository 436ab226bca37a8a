"""``optimum-cli export foldaway``: `foldaway export`, for people who live in that tool.

It is installed as ``optimum.commands.register.register_foldaway``, where optimum looks for subcommands of others: the
one file of ours outside our packages.
"""

from __future__ import annotations

import argparse
import shlex
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from deploy.cli import add_export_options, call, export_command


class ExportFoldaway(BaseOptimumCLICommand):
    """The same options, the same files, the same exit codes."""

    COMMAND = CommandInfo(name="foldaway", help="Export with foldaway: compressed models of any layout, checked.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Add the options of `foldaway export`."""
        add_export_options(parser)

    def run(self) -> None:
        """Export, and end with foldaway's exit code."""
        sys.exit(call(export_command, self.args, shlex.join(["optimum-cli", *sys.argv[1:]])))


REGISTER_COMMANDS = [(ExportFoldaway, ExportCommand)]
