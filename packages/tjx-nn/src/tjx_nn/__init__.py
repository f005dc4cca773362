"""Transformer models in JAX: layers, GPT, BERT, ViT, encoder-decoder, generation and HF weights."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.2.0"
