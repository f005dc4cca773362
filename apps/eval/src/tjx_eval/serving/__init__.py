"""HTTP server: an engine with continuous batching behind the OpenAI API."""
