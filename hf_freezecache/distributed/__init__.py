"""Training on several processes: the group that shares a cache, DDP, and checkpoints that all processes save at once."""
