"""lskd's plugin for mmcls: binary networks that learn from a frozen teacher.

A recipe imports `mmcls_bnn.register`, which registers everything here with mmcls (or mmpretrain).
"""
