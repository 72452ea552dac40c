"""What every run needs around its stages: its directory, processes, interruption, progress, memory."""
