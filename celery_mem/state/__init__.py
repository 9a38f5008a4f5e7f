"""The state machine: schema, scripts, one typed function per script, audit. Knows only Redis."""
