"""What ``jobs/benchmark.py`` measures, a module a subject; machine and report are shared by all."""
