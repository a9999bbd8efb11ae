"""Files and folders: written whole, removed whole, named the same way everywhere."""
