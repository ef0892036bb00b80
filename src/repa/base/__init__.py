"""Layer 0: configuration, registries, files, processes, randomness and images; independent of diffusion."""
