"""Whether an answer is right: used by rewards, by validation and by benchmarks alike."""
