"""Training: settings, losses, schedule, optimizers, the loop and sessions."""
