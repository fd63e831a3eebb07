"""The command line: the only place that parses arguments, prints, configures logging and chooses a device."""

from lustral.cli.entry import main

__all__ = ["main"]
