"""Distillation: the frozen teacher of a run, and the gradients of the loss with it."""
