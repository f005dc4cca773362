"""Prepared sets: token shards, their index, and how they are made."""
