"""Verifiers: rewards of responses that a program can check."""
