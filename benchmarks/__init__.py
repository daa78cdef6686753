"""How fast every op and the whole model is, against PyTorch, transformers and this machine's limits."""
