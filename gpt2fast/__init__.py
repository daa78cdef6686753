"""GPT-2, fast: fused kernels behind a drop-in for Hugging Face's GPT-2, and a kit for kernels of your own."""
__version__ = "0.1.0"
