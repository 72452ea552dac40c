"""The stages of a run: each takes the settings, the data, the run directory and the stop request."""
