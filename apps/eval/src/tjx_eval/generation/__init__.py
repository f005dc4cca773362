"""Text generation: streaming completions, batches of completions and interactive conversations."""
