"""The demonstration: a small trained video VAE, a photograph, and what the backend makes of them."""
