"""The place of the mmcls plugin. Nothing is here yet; `lskd doctor` says so."""
