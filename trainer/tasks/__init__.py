"""Tasks: what they are, where their rows come from, and what a good row is."""
