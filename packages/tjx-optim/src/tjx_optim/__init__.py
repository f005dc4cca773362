"""Optimizers, schedules, accumulation and loss scaling for a training step, based on optax.

Optimizers and schedules are selected by name or registered, weight decay applies by the role of a
parameter, and gradients of several microbatches equal those of one large batch for any numbers of
real tokens.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.2.0"
