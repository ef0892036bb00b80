"""Sources of images: one contract for every kind."""
