"""Pretraining: store -> backbone."""
