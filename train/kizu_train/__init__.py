"""Detectors, recipes, training and evaluation on pictures of good products."""
