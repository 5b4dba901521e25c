"""The bundled trainer, for who has no train.py of upstream's."""
