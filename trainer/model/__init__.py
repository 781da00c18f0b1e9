"""The model: one backbone of transformers, one packed head for all small tasks, the backbone's own output layer."""
