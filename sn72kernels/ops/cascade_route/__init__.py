"""Early-exit routing with order-preserving compaction."""
