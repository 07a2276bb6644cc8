"""From rows to batches: views and their transforms, collators, the order of samples, and augmentation of hidden states."""
