"""What the benchmarks time ours against: the same computed as users, authors and other libraries do it."""
