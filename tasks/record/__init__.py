"""What is remembered: runs, what MLflow is told, the registry."""
