"""Neural decoding: POSSM, its streaming engine and its baselines."""
