"""Configuration tree of a run: dataclasses, presets, validation and resume compatibility."""
