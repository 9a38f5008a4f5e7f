"""Where results live: serialization and blobs in Redis. Knows only Redis."""
