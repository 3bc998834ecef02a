"""Routing strategies, one file each; importing one registers it under its class name."""
