"""Training: the loop, its evaluation, what it shows, and what it learns about the machine."""
