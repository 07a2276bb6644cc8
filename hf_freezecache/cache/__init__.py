"""The cache: one directory with the hidden states of one (data set, transform, prefix weights, split point, ...)."""
