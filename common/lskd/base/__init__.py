"""What everything stands on and that knows nothing of distillation: files, images, what is installed."""
