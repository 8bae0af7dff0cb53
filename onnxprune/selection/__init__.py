"""From scores and ratios to the units that go."""
