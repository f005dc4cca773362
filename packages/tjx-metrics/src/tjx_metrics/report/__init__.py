"""Summaries of runs, comparisons of several runs, and self-contained HTML reports."""
