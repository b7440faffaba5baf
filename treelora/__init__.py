"""Continual learning of large pre-trained models with TreeLoRA (Qian et al., ICML 2025, arXiv 2506.10355)."""

__version__ = "0.1.0"
