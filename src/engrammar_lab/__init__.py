"""What measures memory: studies and tasks, rivals, benches, the demo, and the check against reference files."""
