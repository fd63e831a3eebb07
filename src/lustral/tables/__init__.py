"""From a store to rows, summaries, comparisons and files. Imports no torch."""
