"""Benchmarks of every op and of the whole model, against PyTorch, transformers and this machine's limits.

Run ``python -m benchmarks`` in the repository, or ``python -m gpt2fast.benchmarks`` where gpt2fast is installed.
"""
