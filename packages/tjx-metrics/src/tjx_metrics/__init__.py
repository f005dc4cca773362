"""tjx-metrics: what a training run shows.

Metrics with exact definitions, throughput, trackers (JSONL, console) and loss curves.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.2.0"
