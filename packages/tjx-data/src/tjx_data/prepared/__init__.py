"""Prepared sets: token shards with an index; how they are built, cached and inspected."""
