"""What a user touches: Client, Future, wait, as_completed, progress."""
