"""Ready-made ends: what a SCADA, a flow engine or a database needs to take an agent's messages, from their schemas."""
