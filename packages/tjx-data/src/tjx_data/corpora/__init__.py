"""Corpora as documents: named corpora, local files and the Hugging Face hub."""
