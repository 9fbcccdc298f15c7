"""Studies: many training runs that answer one question, as Ray Tune trials over Ray Train.

Modules: ``record`` (a study on storage) · ``slots`` (how many runs fit side by side) · ``trial`` (one run) ·
``execute`` (all runs of a study) · ``publish`` (what a study leaves) · ``tune`` (a sweep) with
``search`` (what it tries next) · ``ablate`` (the paper's rows) with ``results``, ``report`` and ``paper`` (its tables)
· ``lr_find`` (the learning-rate range test).
"""
