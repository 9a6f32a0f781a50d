"""Graph in, graph out: the rewrites. Runs no tensor."""
