"""Methods compared over seeds, tasks and test images: statistics, results of runs, tables and plots."""
