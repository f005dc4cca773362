"""Exact attention: public functions, the types that backends share, and their registry."""
