"""Accuracy, intervals, the choice of scales, disentanglement."""
