"""Export of models to the Hugging Face Transformers and ONNX formats."""
