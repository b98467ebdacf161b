"""What training, export and the agent must agree on to the bit."""

SCHEMA_VERSION = 1
"""Version of the bundle manifest that this package writes and reads."""
