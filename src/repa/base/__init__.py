"""Configuration, registries, files, processes, randomness and images; independent of diffusion."""
