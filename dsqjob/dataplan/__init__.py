"""The plan of data: every output file, its tensors, and where their bytes come from. Several sinks pour it."""
