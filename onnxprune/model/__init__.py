"""Model files: reading them without their bulk data, weights that are read when needed, writing."""
