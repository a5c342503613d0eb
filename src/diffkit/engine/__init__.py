"""Work over time: the prepared store, prepare, train, sample, checkpoints, devices. Knows no names and no Rich."""
