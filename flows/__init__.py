"""Prefect flows over `tasks`: they walk DVC's graph and repeat none of it."""
