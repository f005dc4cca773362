"""The server: an engine that writes for many at once, and OpenAI's protocol in front of it."""
