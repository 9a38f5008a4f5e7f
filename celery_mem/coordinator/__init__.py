"""The daemon that does what nobody waits for: one leader, one module per duty."""
