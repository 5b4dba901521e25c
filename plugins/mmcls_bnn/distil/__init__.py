"""Distillation in mmcls: teachers, losses, hooks, stored soft labels."""
