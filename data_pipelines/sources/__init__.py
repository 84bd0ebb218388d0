"""Input files, their rows, and the recipe that names them."""
