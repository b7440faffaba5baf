"""Pre-trained models and tokenizers: Hugging Face ids, folders, the packaged SmolLM2 and tiny ones for tests."""
