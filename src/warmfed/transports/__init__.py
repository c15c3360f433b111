"""Where clients run. A transport knows no algorithm by name."""
