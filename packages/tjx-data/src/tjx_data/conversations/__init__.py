"""Conversations: readers, chat templates, loss masks, packing and a viewer."""
