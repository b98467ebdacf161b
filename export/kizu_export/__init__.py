"""From a run to a bundle, by way of a parity gate on the engine that will run it."""
