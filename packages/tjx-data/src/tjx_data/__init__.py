"""Text data for language models: from documents to exact, resumable batches of tokens.

Documents from a named corpus or local files are tokenized into shards with a hashed index. Loaders
read them as batches that are a pure function of (seed, step).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.2.0"
