"""lskd's plugin for timm: distillation in timm's own script or in a bundled trainer.

Importing it must not import timm: the command's errors and help are to be quick.
"""
