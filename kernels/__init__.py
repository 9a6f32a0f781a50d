"""One op a file: the reference, the fake, the kernels. Knows no graph and no process group."""
