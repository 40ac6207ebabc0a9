"""Strategies: one file a method. `build` makes one from a recipe; see `base` for how to write one."""
