"""Settings for an estimate: proposed from pilot chains and a grid, with reasons."""
