"""Optimizers of weight matrices, which take AdamW for all other parameters."""
