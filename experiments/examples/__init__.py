"""Worked examples: scripts of cells that run without changes."""
