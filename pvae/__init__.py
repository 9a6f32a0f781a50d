"""pvae: compiler passes that make diffusion VAEs and DiTs fast on one GPU and exact on many."""

__version__ = "0.1.0"
