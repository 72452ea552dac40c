"""Commands beside the launcher."""
