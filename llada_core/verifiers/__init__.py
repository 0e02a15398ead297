"""Whether an answer is right: used by rewards, by validation and by benchmarks alike. Knows no models and no prompts."""
