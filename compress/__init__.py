"""Models, and how to change them. Knows nothing of the other packages."""
