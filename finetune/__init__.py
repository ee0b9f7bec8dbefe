"""Fine-tuning: backbone + store -> predictor."""
