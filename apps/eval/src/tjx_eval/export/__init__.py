"""Export of models to the Hugging Face Transformers, ONNX and GGUF formats."""
