"""Reports: facts of a run, plain words for every reason, tables for a terminal or a pipe."""
