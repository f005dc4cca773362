"""Fused linear and cross-entropy loss: chunked over the vocabulary, or with stored logits."""
