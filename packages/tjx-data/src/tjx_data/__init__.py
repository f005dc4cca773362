"""From any text to an exact, resumable stream of token batches.

Documents come from a named corpus or from files, become tokens in shards beside an index that
holds their hashes, and are read as batches that are a pure function of (seed, step).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.2.0"
