"""Tokenizers: BPE training, byte and character vocabularies, encoding and decoding."""
