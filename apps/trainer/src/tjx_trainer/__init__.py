"""tjx_trainer: the app that trains. Its parts are imported by module."""

__version__ = "0.2.0"
