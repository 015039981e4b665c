"""Other projects' plug-in points, one file each; none is imported, and nothing is patched, until you ask for it."""
