"""What tests share: tiny models and data, finished runs, a Hub on the loopback."""
