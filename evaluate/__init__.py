"""Evaluation: predictor + store -> predictions and report; features; scores of files."""
