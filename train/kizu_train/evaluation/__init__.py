"""Measures a scorer on test pictures and tells the result; imports no torch, so that export can use it lightly."""
