"""ZIP archives, sans-IO: the directory at an archive's end, and the members that it lists."""
