"""The operations on a GPU, by Triton. Nothing here is imported before a tensor is there that it can take."""
