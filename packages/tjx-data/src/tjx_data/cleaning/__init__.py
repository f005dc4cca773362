"""Cleaning of text corpora: duplicates, quality rules, decontamination and masks."""
