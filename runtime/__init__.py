"""What compiled code calls while it runs. Sees no graph."""
