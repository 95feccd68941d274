"""Looking into models: towers and their tokens, FLOPs, which attention runs."""
