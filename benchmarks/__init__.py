"""How fast every op and the whole model is, against PyTorch, transformers and this machine's limits.

``python -m benchmarks`` in the repository; installed, ``python -m gpt2fast.benchmarks``.
"""
