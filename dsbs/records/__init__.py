"""Records: the rows and results that stages hand on through files."""
