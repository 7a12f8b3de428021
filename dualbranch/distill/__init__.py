"""Training by distillation: one pipeline, from data to report. Entry point: `pipeline.run`."""
