"""Adapter to mmcls: evaluation of its models. Training with it is to come; `lskd doctor` says so."""
