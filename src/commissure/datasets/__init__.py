"""Real data by name: a pinned registry, checked downloads, arrays out."""
