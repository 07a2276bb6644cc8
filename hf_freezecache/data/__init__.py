"""From rows to batches: views, transforms, collators, order."""
