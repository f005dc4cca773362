"""tjx-core: atomic file writes, configuration errors, command-line parsing and deprecation.

Shared by the tjx packages and apps. Standard library only.
"""

from tjx_core.command_line import CommandParser, one_of, whole_number
from tjx_core.deprecation import deprecated_names
from tjx_core.files import fsync_path, write_atomically
from tjx_core.problems import ConfigError, Problem, problems_of
from tjx_core.suggestions import (
    did_you_mean,
    nearest_name,
    nearest_names,
    unknown_flag,
    unknown_name,
)
from tjx_core.text import printable

__version__ = "0.2.0"

__all__ = [
    "CommandParser",
    "ConfigError",
    "Problem",
    "deprecated_names",
    "did_you_mean",
    "fsync_path",
    "nearest_name",
    "nearest_names",
    "one_of",
    "printable",
    "problems_of",
    "unknown_flag",
    "unknown_name",
    "whole_number",
    "write_atomically",
]
