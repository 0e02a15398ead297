"""From sources and puzzles to tokenised rows, and from rows to batches."""
