"""The edge service: cameras → tiles → scorer → verdicts → MQTT."""
