"""The report of results, built from the rows of all studies."""
