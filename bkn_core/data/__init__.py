"""Images and labels: sources, folders, archives, arrays, and the batches of an epoch."""
