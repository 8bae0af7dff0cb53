"""Groups of units that go together, their constraints and their barriers."""
