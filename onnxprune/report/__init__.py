"""What a run found out and how it is shown: facts, plain words for every reason, tables for a terminal or a pipe."""
