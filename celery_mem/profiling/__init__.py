"""What ran, for how long, and in how much memory: sampled and recorded on demand, shown as a page."""
