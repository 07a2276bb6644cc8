"""What a run left behind, for people."""
