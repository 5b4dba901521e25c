"""Teachers measured side by side, before anything is distilled.

The way of a call: ``run`` checks what is asked for; ``evaluate`` asks one teacher after the other, which is a
file that ``outputs`` reads by ``files``, or a model whose answers ``collect`` brings together from all
processes; ``compare`` measures each and takes their differences; ``report`` prints and writes them.
"""
