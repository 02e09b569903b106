"""Plan and run the cells of a sweep, on this machine or on a Ray cluster, and upload the results."""
