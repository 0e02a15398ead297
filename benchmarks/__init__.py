"""Side-by-side speed runs that print ratios: `python -m benchmarks` runs all of them."""
