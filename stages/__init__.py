"""What moves through the pipeline, who works on it, models and workloads."""
