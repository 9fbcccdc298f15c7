"""Studies: many training runs that answer one question, as Ray Tune trials over Ray Train.

Modules: ``record`` (a study on storage) · ``room`` (how many runs fit side by side) · ``trial`` (one run) · ``execute``
(all runs of a study) · ``search`` (what a sweep tries next) · ``tune`` (a sweep from beginning to end) · ``lr_range``
(the learning-rate range test).
"""
