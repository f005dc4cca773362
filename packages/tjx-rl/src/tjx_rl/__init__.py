"""Losses, advantages and verifiers for preference optimization and reinforcement learning.

All functions take the log-probabilities of tokens, so they work with any model. Losses are pure
JAX functions; advantages also accept NumPy arrays.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.2.0"
