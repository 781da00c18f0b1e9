"""What leaves Sett: plain Hugging Face folders with a model card."""
