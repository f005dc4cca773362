"""Attention over a device mesh: sharded heads, ring attention and all-to-all (Ulysses)."""
