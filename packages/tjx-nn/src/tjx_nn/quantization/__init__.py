"""Int8 and int4 weights: kernels and their products, and the quantization of a model."""
