"""What a run came to: its figures, beside those of other runs, and as a page of HTML."""
