"""Training: one loop for pretraining, fine-tuning, policy optimisation and preference tuning.

Import the stage entry point from `llada_core.training.train`; this package imports nothing by itself.
"""
