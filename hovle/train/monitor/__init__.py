"""What is watched while a run goes on: speed, whether pictures matter, the log and its report."""
