"""Layer 0: configuration, registries, files, processes, randomness and images. Knows nothing of diffusion."""
