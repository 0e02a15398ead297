"""Benchmarks: lm-eval's model, recipes for published columns, and a report that sets intervals beside every score.

The only room that knows lm-eval. It does not know training, registries or stages.
"""
