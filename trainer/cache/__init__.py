"""The token cache: rows tokenised once, kept as memory-mapped Arrow files, read back as numpy arrays."""
