"""A Sparkplug B 3.0 edge node: the agent is the node, its cameras are the devices (docs/sparkplug.md)."""
