"""Worked examples: scripts of cells that run as they are."""
