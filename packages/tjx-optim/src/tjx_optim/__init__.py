"""tjx-optim: the update of a training step, thin over optax and exact.

Optimizers and schedules by name, weight decay chosen by a parameter's path, and gradients of
several microbatches that equal those of one large batch whatever the counts of real tokens.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.2.0"
