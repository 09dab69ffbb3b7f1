"""The built-in studies: a file each, with its configurations and what its report shows."""
