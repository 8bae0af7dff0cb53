"""What the benchmarks share: model files, workers with a time limit, peers, an independent check of a cut, tables."""
