"""Int8 weights: the kernel and its product, and the quantization of a model's parameters."""
