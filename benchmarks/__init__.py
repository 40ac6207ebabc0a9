"""Measurements of speed, as ratios of what runs side by side: never part of the tests."""
