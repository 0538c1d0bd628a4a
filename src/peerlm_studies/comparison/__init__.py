"""Compare methods: a recipe, its runs made into rows, and their table and plot."""
