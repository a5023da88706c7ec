"""Experiments: config, data, models, training, checkpoints, figures and pages."""
