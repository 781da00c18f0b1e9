"""Studies: arms x tasks x seeds, each an ordinary run of `sett train`, and one table at the end."""
