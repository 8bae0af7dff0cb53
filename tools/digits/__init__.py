"""The small models under models/: their data, networks, training and export. Needs the extra `models`."""
