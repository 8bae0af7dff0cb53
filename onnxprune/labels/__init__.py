"""Labels: integer arrays that say which removable channel stands where."""
