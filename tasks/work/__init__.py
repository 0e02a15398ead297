"""What a stage does, whoever starts it: data, training, evaluation, report, registration."""
