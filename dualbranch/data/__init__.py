"""Training data: verifiable problems (`problem.py`, `tasks/`), text and packing."""
