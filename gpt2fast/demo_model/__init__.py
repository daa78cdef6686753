"""The model that ``make demo`` writes with: a small GPT-2 trained on Python's own standard library (see README.md)."""
