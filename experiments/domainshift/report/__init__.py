"""The report of a suite, made from the records in its folder and from nothing else."""
