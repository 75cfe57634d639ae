"""Built-in model adapters, one architecture a file, found through the entry-point group `mlx_kvq_plugin.adapters`."""
