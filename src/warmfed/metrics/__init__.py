"""Metrics of predictions and of images: pure functions of tensors."""
