"""The command line: every file registers one group of commands; a new command is one file (or function) and one import."""

from linger.cli import chips, files, nets, reports, train, why
from linger.cli._app import app

__all__ = ["app", "chips", "files", "nets", "reports", "train", "why"]
