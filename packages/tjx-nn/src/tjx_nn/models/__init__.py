"""Models (GPT, BERT, ViT, encoder-decoder) and their configurations."""
