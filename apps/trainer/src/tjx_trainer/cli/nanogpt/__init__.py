"""Compatibility with nanoGPT: its flags and config files as a tjx configuration."""
