"""Where results live: files of nodes, blobs in Redis, and the ways between them. Knows only Redis."""
