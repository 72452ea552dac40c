"""Plan a run on a GPU that is not here: memory, time and batch sizes, from the program compiled for it."""
