"""Normalizations of other authors that `bkn compare` sets beside ours: one file each, after its paper's formula."""
