"""The embedded task: scans of handwritten digits, scenes made of them, questions, and the vision tower."""
