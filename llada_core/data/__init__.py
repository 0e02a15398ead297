"""From sources and puzzles to tokenised rows, and from rows to batches. Knows no model and no objective."""
