"""Services for the stages of a run: its directory, processes, interruption, progress, memory."""
