"""Where text comes from: documents, by name or by path."""
