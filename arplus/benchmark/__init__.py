"""What ``jobs/benchmark.py`` measures, a module per question; ``baselines`` are what the answers are held against.

How fast is this machine (``step_speed``, ``reply_speed``), its feed (``feed_speed``), its preparation of records
(``prepare_speed``); does a cluster scale (``scaling``); what does a failure cost (``recovery``). ``options`` has their
settings, ``pool`` examples of real lengths, ``usage`` time and memory, ``figures`` the table, JSON and MLflow run.
"""
