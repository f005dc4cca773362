"""Commands of the `tjx-eval` program, one module per command, and their command-line parser."""
