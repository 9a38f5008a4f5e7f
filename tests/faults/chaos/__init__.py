"""Real work on a real cluster while whatever can break is broken, by a schedule that a seed reproduces."""
