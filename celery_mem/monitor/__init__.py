"""Our page and metrics inside Flower; reads only, and unpickles nothing."""
